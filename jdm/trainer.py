"""train(config, workdir): the one place that orders things.

Owns the run: what is checked first, what is restored, when it logs, evaluates and saves. The
learning itself is in jdm.training.
"""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jdm import checkpoint
from jdm import config as configs
from jdm.analysis.evaluate import classification
from jdm.data.datasets import dataset
from jdm.data.pipeline import TrainBatches, train_batches
from jdm.data.records import check_prepared
from jdm.data.splits import keep_classes, load_split, splits_of, training_set
from jdm.files import write_whole
from jdm.joint import Joint, load
from jdm.mesh import by_row, check_batch, make_mesh, replicated, to_global
from jdm.tracking import MetricLog, Progress
from jdm.training.augment import POLICIES
from jdm.training.build import Run, build
from jdm.training.step import TrainState
from jdm.training.warm import new_arrays, warm_started


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is not a finite number; the message names the step."""


def train(config: ConfigDict, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """Trains as the config says, or goes on where the work folder's last checkpoint stands.

    dry_run: build and compile, say how large it is, write nothing.

    Raises ConfigError for a config that does not fit together or differs from the work folder's,
    CheckpointError where saving fails, NonFiniteError where the loss is no number any more.
    """
    started = time.monotonic()
    workdir = Path(workdir)
    mesh = make_mesh()
    run = prepare(config, mesh)
    if not dry_run:
        for name in filter(None, (config.data.name, config.data.unlabelled)):
            check_prepared(name, config.data.dir)
    fresh = not checkpoint.steps(workdir)
    source = warm_source(config, run) if config.train.init_from and fresh else None
    claim(config, workdir, write=not dry_run)
    root = jax.random.key(config.seed)

    if dry_run:
        _compile(config, run, mesh, root)
        print("dry run: nothing was written")
        return

    newest = checkpoint.newest_whole(workdir)
    if newest is not None and newest >= config.train.steps:
        print(f"{workdir} is trained already: {newest} of {config.train.steps} steps")
        return
    batches, held_out = read(config)
    step = _compile(config, run, mesh, root)
    start = newest or 0
    if newest is None:
        state = begin(config, run, root, source)
    else:
        state = resume(run, workdir, newest, batches, root)

    def due(every: int, done: int) -> bool:
        return done == config.train.steps or (every > 0 and done % every == 0)

    rows = config.data.batch_size
    pending: list[dict] = []  # averages still on the device, of the steps since the last row
    with (
        MetricLog(workdir, start, started) as log,
        Progress(config.train.steps * rows, "training", "images", start * rows) as progress,
    ):
        since = time.monotonic()
        for done in range(start + 1, config.train.steps + 1):
            state, averages = step(state, to_global(next(batches), mesh), root)
            pending.append(averages)
            progress.advance(rows)

            logs, evaluates, saves = (
                due(section.every, done) for section in (config.log, config.eval, config.checkpoint)
            )
            row = {}
            if logs or evaluates or saves:
                seen = len(pending) * rows
                row = fetch(pending, first=done - len(pending) + 1)
                row["train/images_per_second"] = seen / (time.monotonic() - since)
                pending = []
            if evaluates:
                joint = Joint(config, run.model, run.diffusion, state.ema)
                for name, value in classification(joint, *held_out, config.eval.batch_size):
                    row[f"eval/{name}"] = value
            if row:
                log.write(done, done * rows, row)
                progress.say(_line(done, row))
            if saves:
                save(config, workdir, state, batches)
            if row:
                since = time.monotonic()


def read(config: ConfigDict) -> tuple[TrainBatches, tuple[np.ndarray, np.ndarray]]:
    """(what is trained on, the images and labels of the split that is evaluated)."""
    model, data = config.model, config.data
    same = dict(
        size=model.image_size,
        channels=model.image_channels,
        classes=data.classes,
        validation=data.validation,
        cache_dir=data.cache_dir,
    )
    try:
        images, labels = training_set(
            data.name,
            data.dir,
            seed=config.seed,
            limit=data.limit,
            labelled_fraction=data.labelled_fraction,
            labelled_per_class=data.labelled_per_class,
            unlabelled=data.unlabelled,
            workers=data.workers,
            **same,
        )
        held_out = load_split(data.name, config.eval.split, data.dir, workers=data.workers, **same)
    except ValueError as error:
        raise configs.ConfigError(f"config.{error}") from error
    if not len(labels) or not (held_out[1] >= 0).any():
        raise configs.ConfigError(
            f"config.data.validation={data.validation} leaves {len(labels):,} images to train on, "
            f"and {len(held_out[1]):,} of config.eval.split={config.eval.split!r}, with or without "
            "labels; both need images, and the second labelled ones"
        )
    _check_labels(labels, model.num_classes, model.multi_label)
    known = np.sum(labels.reshape(len(labels), -1).max(axis=1) >= 0)
    print(
        f"training on {len(images):,} images, {known:,} of them labelled; "
        f"evaluating on {len(held_out[0]):,} ({config.eval.split})"
    )
    batches = train_batches(
        images,
        labels,
        batch_size=data.batch_size,
        seed=config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=data.workers,
    )
    return batches, held_out


def prepare(config: ConfigDict, mesh: jax.sharding.Mesh) -> Run:
    """The parts of a run, after every check that needs no data. Raises ConfigError."""
    try:
        facts = dataset(config.data.name)
        if config.data.unlabelled:
            dataset(config.data.unlabelled)
        # Of no image yet: whether there are such classes, before anything is decoded.
        keep_classes(np.zeros((0, facts.num_classes), np.int32), config.data.classes, facts)
    except ValueError as error:
        raise configs.ConfigError(f"config.{error}") from error
    for key, allowed in (
        ("image_size", facts.sizes),
        ("image_channels", (facts.channels,) if facts.channels else (1, 3)),
        ("num_classes", (len(config.data.classes) or facts.num_classes,)),
        ("multi_label", (facts.multi_label,)),
    ):
        if allowed and config.model[key] not in allowed:
            with_classes = (
                f" with config.data.classes={config.data.classes}" if config.data.classes else ""
            )
            raise configs.ConfigError(
                f"config.model.{key}={config.model[key]} does not fit config.data.name="
                f"{config.data.name!r}, which has {' or '.join(map(str, allowed))}{with_classes}"
            )
    splits = splits_of(facts, config.data.validation)
    if config.eval.split not in splits:
        raise configs.ConfigError(
            f"config.eval.split={config.eval.split!r} is not there: "
            f"config.data.name={config.data.name!r} has {', '.join(splits)}, and "
            f"config.data.validation={config.data.validation} of train is held out"
        )
    rows, parts = config.data.batch_size, config.train.accumulate
    name = "data.batch_size" if parts == 1 else "data.batch_size / train.accumulate"
    try:
        check_batch(rows // parts, mesh, name)
        run = build(config, replicated(mesh))
    except ValueError as error:
        raise configs.ConfigError(f"config.{error}") from error
    if POLICIES[config.loss.augment].flips and not facts.flips:
        # No error: the published recipes do so, and are to be compared with.
        warnings.warn(
            f"config.loss.augment={config.loss.augment!r} mirrors images, which changes what they "
            f"show in config.data.name={config.data.name!r}; 'digits' and 'none' do not",
            stacklevel=2,
        )
    return run


def claim(config: ConfigDict, workdir: Path, write: bool) -> None:
    """Makes the work folder this config's. Raises ConfigError where it is another's."""
    path = workdir / "config.json"
    if path.exists():
        differing = configs.differences(configs.from_dict(json.loads(path.read_text())), config)
        if differing:
            raise configs.ConfigError(
                f"--workdir={workdir} holds a run with another config ({'; '.join(differing)}); "
                "choose another folder, or the same values"
            )
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(configs.to_dict(config), indent=2) + "\n")


def begin(config: ConfigDict, run: Run, root: Any, source: Joint | None) -> TrainState:
    """The state before the first step: new, or with the weights of train.init_from.

    source: the model there, where it was loaded already.
    """
    if not config.train.init_from:
        return run.init(root)
    source = source or warm_source(config, run)
    new, count = new_arrays(run.state.ema, source.weights), len(jax.tree.leaves(run.state.ema))
    listed = f"; new: {', '.join(new)}" if new else ""
    print(f"restored {count - len(new)} of {count} arrays of {config.train.init_from}{listed}")
    return warm_started(run.init(root), source.weights)


def warm_source(config: ConfigDict, run: Run) -> Joint:
    """The model at train.init_from. Raises ConfigError where there is none whose network fits."""
    path = config.train.init_from
    try:
        joint = load(path)
        new_arrays(run.state.ema, joint.weights)
    except (checkpoint.CheckpointError, ValueError) as error:
        raise configs.ConfigError(f"config.train.init_from={path!r}: {error}") from error
    return joint


def resume(run: Run, workdir: Path, step: int, batches: TrainBatches, root: Any) -> TrainState:
    """The state that a checkpoint goes on from, after saying which.

    That of a run, with the position of `batches`; or, where a conversion left weights alone, those.
    """
    if step > 0 or "train_state" in checkpoint.items(workdir, step):
        print(f"going on from step {step} of {workdir}")
        return restore(run, workdir, step, batches)
    print(f"{workdir} holds weights only: training starts from them, with a new optimiser")
    weights = checkpoint.restore(workdir, step, weights=run.state.ema)["weights"]
    return warm_started(run.init(root), weights)


def restore(run: Run, workdir: Path, step: int, batches: TrainBatches) -> TrainState:
    """The state that was saved at a step; `batches` takes its position."""
    abstract = run.state
    items = checkpoint.restore(
        workdir, step, weights=abstract.ema, train_state=_without_ema(abstract)
    )
    batches.set_state(checkpoint.read_data(workdir, step))
    return TrainState(ema=items["weights"], **items["train_state"])


def save(config: ConfigDict, workdir: Path, state: TrainState, batches: TrainBatches) -> None:
    """A checkpoint of everything the next step depends on."""
    checkpoint.save(
        workdir,
        int(state.step),
        weights=state.ema,
        train_state=_without_ema(state),
        data=batches.get_state(),
        config=configs.to_dict(config),
        keep=config.checkpoint.keep,
    )


def _without_ema(state: TrainState) -> dict[str, Any]:
    """The item `train_state`: the averages are the item `weights`, and stored once."""
    rest = {name: value for name, value in vars(state).items() if name != "ema"}
    return {name: value for name, value in rest.items() if value is not None}


def fetch(pending: list[dict], first: int) -> dict[str, float]:
    """{train/name: average} over steps; first: the number of the first of them.

    The one place where the training loop reads from the device. Raises NonFiniteError.
    """
    rows = jax.device_get(pending)
    for number, row in enumerate(rows, first):
        for name, (total, _) in row.items():
            if not np.isfinite(total):
                raise NonFiniteError(
                    f"{name} is {total} at step {number}; nothing was saved since the last "
                    "checkpoint; a lower optim.lr or a higher optim.warmup_steps may help"
                )
    averages = {}
    for name in rows[0]:
        total, count = np.sum([row[name] for row in rows], axis=0, dtype=np.float64)
        if count:  # no label among the images: no average, and no row
            averages[f"train/{name}"] = total / count
    return averages


def abstract_batch(config: ConfigDict, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """Shapes and dtypes of a global batch."""
    model, rows = config.model, config.data.batch_size
    image = (rows, model.image_size, model.image_size, model.image_channels)
    label = ((rows, model.num_classes), np.int8) if model.multi_label else ((rows,), np.int32)
    return {
        "image": jax.ShapeDtypeStruct(image, np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct(*label, sharding=sharding),
    }


def _compile(config: ConfigDict, run: Run, mesh, root) -> Any:
    """The compiled step, after saying what is compiled."""
    batch = abstract_batch(config, by_row(mesh))
    rows, *shape = batch["image"].shape
    count = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    kind = jax.devices()[0].device_kind
    print(
        f"compiling the training step: {count:,} parameters, batches of {rows} images "
        f"{'×'.join(map(str, shape))}, {mesh.size} device{'s' * (mesh.size > 1)} ({kind})",
        flush=True,
    )
    started = time.monotonic()
    compiled = run.step.lower(run.state, batch, root).compile()
    memory = compiled.memory_analysis()
    needs = ""
    if memory is not None:
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needs = f"; it needs {size / 2**20:,.0f} MiB on each device"
    print(f"compiled in {time.monotonic() - started:.0f} s{needs}", flush=True)
    return compiled


def _check_labels(labels: np.ndarray, num_classes: int, multi_label: bool) -> None:
    """Raises ConfigError where the labels of the data are not those that the model is to learn."""
    shape = (len(labels), num_classes) if multi_label else (len(labels),)
    asked = f"config.model.num_classes={num_classes} with config.model.multi_label={multi_label}"
    if labels.shape != shape:
        raise configs.ConfigError(
            f"{asked} needs labels of the shape {shape}, but the data hold {labels.shape}"
        )
    wrong = labels[(labels < -1) | (labels > (1 if multi_label else num_classes - 1))]
    if wrong.size:
        raise configs.ConfigError(f"{asked}, but the data hold the label {wrong[0]}")


def _line(done: int, row: dict[str, float]) -> str:
    return f"step {done}  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items())
