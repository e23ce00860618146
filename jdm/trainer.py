"""`train`: a training run from its first check to its last checkpoint.

Owns the order of the checks, and when a run logs, evaluates and saves. What it begins from is in
jdm.resume, the loss and the training step are in jdm.training. Of the processes of a run, process 0
writes all files but the checkpoints, which all write together.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jdm import checkpoint, distributed
from jdm.analysis.evaluators import EvaluationOptions, Value, evaluate
from jdm.config import config_to_dict
from jdm.data.fit import check_config_fits, check_labels, check_not_empty, ood_options
from jdm.data.identity import identity_of_run
from jdm.data.pipeline import TrainBatches, check_main_guard, train_batches
from jdm.data.records import check_prepared
from jdm.data.splits import ReadOptions, Split, load_split, training_set
from jdm.distributed import Preempted
from jdm.errors import Failure, InvalidValue
from jdm.files import LOCK, location, new_folder
from jdm.joint import Joint
from jdm.mesh import by_row, make_mesh, share_of_each, to_global
from jdm.messages import STDOUT, say
from jdm.numerics import fixed_flags, key_of
from jdm.preemption import Notice, watched
from jdm.profiling import StepTrace
from jdm.resume import (
    begin,
    best_so_far,
    check_data,
    check_workdir,
    resume,
    say_learning_rate,
    trees_of,
    warm_source,
)
from jdm.startup import release_memory
from jdm.storage import storage_of
from jdm.tracking import MetricLog, Progress, shown
from jdm.training.augment import POLICIES
from jdm.training.build import Run, abstract_batch, build, check_batch_of


class NonFiniteError(Failure):
    """A loss or a gradient that is not finite; the message names the step."""


@fixed_flags()
def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    dry_run: bool = False,
    other_data: bool = False,
    profile: str | os.PathLike | None = None,
    on_row: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Trains a model, or resumes from the work folder's last checkpoint.

    dry_run: build and compile, print the memory needed, write nothing. other_data: resume even
    where the data has other images, labels or names of classes than the checkpoint says. profile: a
    folder to which a trace of some steps is written, see `profiling.StepTrace`. on_row: called with
    each row of metrics.jsonl when it was written, in place of printing it, such as
    `notebook.Curves()`; what it raises ends the run.

    Raises InvalidValue for values of the config that do not fit together or differ from those of
    the work folder, and for other data; CheckpointError where saving fails, DataError where the
    data cannot be read, NonFiniteError where the loss is not finite, and distributed.Preempted
    after SIGTERM, once a checkpoint is saved. Before the first step SIGTERM ends the process.
    """
    started, workdir = time.monotonic(), epath.Path(location("workdir", workdir))
    storage = storage_of(workdir)
    storage.check("workdir", workdir)
    if profile is not None and dry_run:
        raise InvalidValue("profile", str(profile), "does not go with dry_run, which runs no step")
    mesh, root = make_mesh(), key_of(config.seed)  # first: it says where a platform is not there
    main = distributed.is_main()
    traces = new_folder("profile", profile, make=True) if profile is not None and main else None
    check_main_guard(config.data.workers)
    run = prepare(config, mesh)
    for name in filter(None, (config.data.name, config.data.unlabelled, config.eval.ood)):
        if not dry_run:
            check_prepared(name, config.data.dir)
    source = None if checkpoint.steps(workdir) else warm_source(config, run)
    check_workdir(config, workdir)
    if dry_run:
        compile_step(config, run, mesh, root)
        say("dry run: nothing was written", STDOUT)
        return

    if main:
        storage.make("workdir", workdir)
    alone = storage.only_job(workdir) if main else contextlib.nullcontext(lambda: None)
    with alone as check_alone, watched() as notice:
        check_shared(workdir)
        rest = (other_data, started, traces, on_row, notice, check_alone)
        _train(config, workdir, run, mesh, root, source, *rest)


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    run: Run,
    mesh: jax.sharding.Mesh,
    root: Any,
    source: Joint | None,
    other_data: bool,
    started: float,
    traces: Path | None,
    on_row: Callable[[dict[str, Any]], Any] | None,
    notice: Notice,
    check_alone: Callable[[], None],
) -> None:
    """What `train` does in a work folder that no other job writes to."""
    last = checkpoint.newest_whole(workdir)
    main = distributed.is_main()
    if main:
        content = json.dumps(config_to_dict(config), indent=2) + "\n"
        storage_of(workdir).write(workdir / "config.json", content)
    if last is not None and last >= config.train.steps:
        untraced = ", so that there is nothing to trace" if traces else ""
        say(f"{workdir} is trained already: {last} of {config.train.steps} steps{untraced}", STDOUT)
        return
    best = best_so_far(config, workdir, last)
    if best and best.ends(config.train.patience):
        say(f"{workdir} is trained already: {best.sentence}", STDOUT)
        return
    (batches, evaluated), options = read_data(config), evaluation_options(config)
    dataset = identity_of_run(config.data, ReadOptions.of(config.data, config.model))
    if last is not None and not other_data:
        check_data(workdir, last, dataset)
    if last is None:
        state = begin(config, run, root, source or warm_source(config, run), dataset)
    else:
        say_learning_rate(config, workdir, last)
        state = resume(run, workdir, last, batches, root, other_data)
    start, rows = last or 0, config.data.batch_size

    def evaluation(state: Any, done: int) -> Iterator[tuple[str, Value]]:
        joint = Joint(config, run.model, run.diffusion, state.ema, dataset, done)
        return evaluate(joint, config.eval.metrics, evaluated, options)

    try:  # what cannot be evaluated is refused before the first step; nothing is computed yet
        evaluation(state, start)
    except InvalidValue as error:
        known = error.parameter in config.eval
        raise (error.about(f"config.eval.{error.parameter}") if known else error) from None
    step = compile_step(config, run, mesh, root)

    before: dict[str, float] = {}  # the row of the evaluation before
    pending: list[dict] = []  # metrics of the steps since the last row, still on the device
    with (
        MetricLog(workdir, start, started) if main else contextlib.nullcontext() as log,
        Progress(config.train.steps * rows, "training", "images", start * rows) as progress,
        StepTrace(traces, start + 1, config.train.steps) as traced,
    ):
        since = time.monotonic()
        notice.begin()
        for done in range(start + 1, config.train.steps + 1):
            with traced.step(done) as results:
                state, metrics = step(state, to_global(next(batches), mesh), root)
                results.append(metrics)
            pending.append(metrics)
            progress.advance(rows)

            logs, evaluates, saves = due(config, done)
            # A notice that comes during an evaluation stops the run after it.
            stops = not evaluates and notice.reached(done)
            if not (logs or evaluates or saves or stops):
                continue
            row = fetch(pending, first=done - len(pending) + 1)
            row["train/images_per_second"] = len(pending) * rows / (time.monotonic() - since)
            pending = []
            if evaluates:
                values = evaluation(state, done)
                found = {name: v for name, v in values if isinstance(v, float)}
                # All processes go on from the same values, also where their machines differ.
                numbers = distributed.from_main(np.array(list(found.values()), np.float64))
                found = dict(zip(found, numbers.tolist(), strict=True))
                row |= {f"eval/{name}": value for name, value in found.items()}
                best = best and best.updated(done, found)
                stops = notice.reached(done)
            ends = best is not None and best.ends(config.train.patience)
            written = log.write(done, done * rows, row) if log else None
            if on_row and written:
                on_row(written)
            else:
                progress.say(shown(done, row, before))
            before = row if evaluates else before
            if saves or ends or stops or (best and best.step == done):
                # Everything that the next step depends on, and the next evaluation.
                data = batches.get_state() | {"dataset": dataset}
                data |= {"best": dataclasses.asdict(best)} if best else {}
                kept: dict[str, Any] = {k: config.checkpoint[k] for k in ("keep", "keep_every")}
                kept |= dict(data=data, config=config_to_dict(config))
                kept["spared"] = best.step if best else None
                check_alone()
                if log:
                    log.sync()  # first: what is trained after the checkpoint is logged again
                checkpoint.save(workdir, done, **trees_of(state), **kept)
            if best and ends:
                progress.say(f"ended at step {done}: {best.sentence}")
                break
            if stops and done < config.train.steps:
                said = f"SIGTERM ended the run after step {done} of {config.train.steps}"
                raise Preempted(f"{said}, which is saved; the same command goes on from there")
            since = time.monotonic()


def due(config: ConfigDict, done: int) -> list[bool]:
    """Whether the run logs, evaluates and saves after `done` steps; the last step does all."""
    last, intervals = done == config.train.steps, (config.log, config.eval, config.checkpoint)
    return [last or (one.every > 0 and done % one.every == 0) for one in intervals]


def evaluation_options(config: ConfigDict) -> EvaluationOptions:
    """What the evaluators need. Reads the data set config.eval.ood, where there is one."""
    data, model, section = config.data, config.model, config.eval
    load_one = functools.partial(load_split, data.name, options=ReadOptions.of(data, model))
    other = section.ood and load_split(section.ood, section.split, ood_options(data, model))
    names = ("batch_size", "samples", "features")
    given = {name: section[name] for name in names}
    steps = section.bound_steps or None
    return EvaluationOptions(
        **given, load=load_one, other=other or None, bound_steps=steps, shared=True
    )


def prepare(config: ConfigDict, mesh: jax.sharding.Mesh) -> Run:
    """The parts of a run. Raises InvalidValue, from all checks of the config that need no data."""
    facts = check_config_fits(config.data, config.model, config.eval)
    check_batch_of(config, mesh)
    run, parts = build(config, mesh), config.exec.accumulate
    if POLICIES[config.loss.augment].flips and not facts.flips:
        # Not an error: the published recipes do this, and must stay reproducible.
        warnings.warn(
            f"config.loss.augment={config.loss.augment!r} flips images, which changes the class of "
            f"images in config.data.name={config.data.name!r}; 'digits' and 'none' do not",
            stacklevel=2,
        )
    classifies = "classifier" in config.loss.terms and config.loss.weight
    if parts > 1 and run.state.batch_stats and classifies:
        warnings.warn(
            f"config.exec.accumulate={parts} changes the loss, not only its memory: "
            f"config.model.head={config.model.head!r} normalises over each part of "
            f"{config.data.batch_size // parts} rows, and moves its running statistics {parts} "
            "times a step; with another head the loss is that of the whole batch",
            stacklevel=2,
        )
    return run


def check_shared(workdir: epath.Path) -> None:
    """Raises InvalidValue in a process that does not see what process 0 has just written to the
    work folder. All processes of a run call it together, while process 0 holds the folder."""
    if distributed.count() == 1:
        return
    distributed.barrier("process 0 holds the work folder")
    try:
        content = storage_of(workdir).read(workdir / LOCK)
    except FileNotFoundError:
        content = b""
    if not distributed.same_as_main(content):
        allowed = "is another folder here than in process 0; all processes need one that they share"
        raise InvalidValue("workdir", str(workdir), allowed)


def read_data(config: ConfigDict) -> tuple[TrainBatches, Split]:
    """(the training batches, the split to evaluate on)."""
    model, data = config.model, config.data
    options = ReadOptions.of(data, model)
    kept = {k: data[k] for k in ("limit", "labelled_fraction", "labelled_per_class", "unlabelled")}
    images, labels = training_set(data.name, options, seed=config.seed, **kept)
    evaluated = load_split(data.name, config.eval.split, options)
    check_not_empty(labels, evaluated.labels, data, config.eval)
    check_labels(labels, model.num_classes, model.multi_label)
    known = np.sum(labels.reshape(len(labels), -1).max(axis=1) >= 0)
    say(
        f"training on {len(images):,} images, {known:,} of them labelled; "
        f"evaluating on {len(evaluated.images):,} ({config.eval.split})",
        STDOUT,
    )
    batching = dict(batch_size=data.batch_size, seed=config.seed, workers=data.workers)
    hosts = dict(host=distributed.index(), hosts=distributed.count())
    return train_batches(images, labels, **batching, **hosts), evaluated


def compile_step(config: ConfigDict, run: Run, mesh: jax.sharding.Mesh, root: Any) -> Any:
    """The compiled training step; prints the size of the model and the memory of the step."""
    batch = abstract_batch(config, by_row(mesh))
    rows, *shape = batch["image"].shape
    count = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    images = f"batches of {rows} images {'×'.join(map(str, shape))}"
    devices = f"{mesh.size} device{'s' * (mesh.size > 1)} ({jax.devices()[0].device_kind})"
    say(f"compiling the training step: {count:,} parameters, {images}, {devices}", STDOUT)
    if config.exec.mesh != "data":
        share, whole = share_of_each(run.state)
        arrays = f"{whole} of {len(jax.tree.leaves(run.state))} arrays, small ones, are whole"
        say(f"{config.exec.mesh}: each device holds {share:.1%} of the state; {arrays}", STDOUT)
    started, needs = time.monotonic(), ""
    compiled = run.step.lower(run.state, batch, root).compile()
    release_memory()
    if (memory := compiled.memory_analysis()) is not None:
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needs = f"; it needs {size / 2**20:,.0f} MiB on each device"
    say(f"compiled in {time.monotonic() - started:.0f} s{needs}", STDOUT)
    return compiled


def fetch(pending: list[dict], first: int) -> dict[str, float]:
    """{"train/name": mean over the steps}. first: the first step. Raises NonFiniteError."""
    rows = jax.device_get(pending)  # the training loop reads from the device only here
    for number, row in enumerate(rows, first):
        for name, (total, _) in row.items():
            if not np.isfinite(total):
                raise NonFiniteError(
                    f"{name} is {total} at step {number}; nothing was saved since the last "
                    "checkpoint; a lower optim.lr or a higher optim.warmup_steps may help"
                )
    sums = {name: np.array([row[name] for row in rows], np.float64).sum(axis=0) for name in rows[0]}
    # The count is 0 where no image has a label.
    return {f"train/{name}": total / count for name, (total, count) in sums.items() if count}
