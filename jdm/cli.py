"""The commands: jdm train, jdm sample, jdm eval, jdm convert, jdm data.

Owns what each does with its flags (jdm.flags), and how an error reaches the user: one sentence and
no traceback, with exit status 2 for what was typed wrong and 1 for what went wrong on the way.
Flags and configs are checked before JAX is imported, which is why the imports stand inside.
"""

import argparse
import itertools
import json
import os
import sys
import warnings
from pathlib import Path

from jdm import config as configs
from jdm import flags
from jdm.files import write_whole


class UsageError(flags.FlagError):
    """A flag that cannot be right: exit status 2."""


class Failure(Exception):
    """What a user may meet and no flag could have told: exit status 1."""


def main(argv: list[str] | None = None) -> None:
    """Runs one command line and exits with its status."""
    argv = sys.argv[1:] if argv is None else argv
    overrides = [flag for flag in argv if flag.startswith("--config.")]
    arguments = flags.parser(COMMANDS).parse_args([flag for flag in argv if flag not in overrides])
    arguments.overrides = overrides
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        if overrides and getattr(arguments, "config", None) is None:
            raise UsageError(f"{overrides[0]} goes with --config; a checkpoint has its config")
        arguments.run(arguments)
    except (flags.FlagError, configs.ConfigError) as error:
        _exit(arguments.command, error, 2)
    except (Failure, OSError) as error:
        _exit(arguments.command, error, 1)
    except KeyboardInterrupt:
        _exit(arguments.command, "interrupted", 130)


def _exit(command: str, error: object, status: int) -> None:
    print(f"jdm {command}: {error}", file=sys.stderr)
    sys.exit(status)


# Commands ----------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """jdm train"""
    config = configs.load(arguments.config, arguments.overrides)
    workdir = Path(arguments.workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir={workdir} is a file; a folder is needed")

    use_compilation_cache()
    from jdm import trainer
    from jdm.checkpoint import CheckpointError
    from jdm.data import DataError

    try:
        trainer.train(config, workdir, dry_run=arguments.dry_run)
    except (CheckpointError, DataError, trainer.NonFiniteError) as error:
        raise Failure(error) from error


def sample(arguments: argparse.Namespace) -> None:
    """jdm sample"""
    seeds = flags.numbers("seeds", arguments.seeds)
    asked = None if arguments.labels is None else flags.labels(arguments.labels)
    out = _writable("out", arguments.out)
    _check_hosts(arguments)

    use_compilation_cache()
    _join_hosts(arguments)
    from jdm.sampling import check, check_format, runs

    names = ("checkpoint", "classifier")
    plain = ("sampler", "spacing", "eta", "threshold", "guidance", "scale", "scale_schedule")
    try:
        film = check_format(out) == ".gif"
        joint = _load("checkpoint", arguments.checkpoint)
        classifier = arguments.classifier and _load("classifier", arguments.classifier) or None
        request = check(
            joint,
            labels=None if asked is None else _labels(asked, len(seeds), joint.model),
            seeds=seeds,
            steps=int(arguments.steps) if arguments.steps.isdecimal() else arguments.steps,
            blocks=arguments.blocks and arguments.blocks.split(","),
            inner_steps=arguments.inner_steps,
            classifier=classifier,
            film=film,
            batch_size=arguments.batch_size,
            **{name: getattr(arguments, name) for name in plain},
        )
        given = {name: getattr(arguments, name) for name in names}
        settings = request.settings(joint, **given)
        runs.check_out(out, settings, arguments.resume)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    options = dict(resume=arguments.resume, batch_size=arguments.batch_size)
    try:
        done = runs.run(joint, request, settings, out, **options)
    except (FloatingPointError, MemoryError) as error:
        raise Failure(error) from error
    print(f"wrote {len(seeds)} images to {out}" if done else f"{out} is complete already")


def evaluate(arguments: argparse.Namespace) -> None:
    """jdm eval"""
    use_compilation_cache()
    from jdm.analysis.evaluate import classification
    from jdm.data import DataError
    from jdm.data.datasets import dataset
    from jdm.data.splits import load_split

    joint = _load("checkpoint", arguments.checkpoint)
    config, name = joint.config, arguments.data or joint.config.data.name
    try:
        # Another set that has just the model's classes has them in the model's order.
        same = name == config.data.name or dataset(name).num_classes != config.model.num_classes
        images, labels = load_split(
            name,
            arguments.split,
            arguments.data_dir or config.data.dir,
            size=config.model.image_size,
            channels=config.model.image_channels,
            classes=config.data.classes if same else (),
            validation=config.data.validation,
            cache_dir=config.data.cache_dir,
        )
        _check_fits(joint, name, labels)
    except ValueError as error:
        raise UsageError(_flagged(error, arguments)) from error
    except DataError as error:
        raise Failure(error) from error
    report = {
        "checkpoint": arguments.checkpoint,
        "data": name,
        "split": arguments.split,
        "images": len(images),
        **dict(classification(joint, images, labels, joint.config.eval.batch_size)),
    }
    for key, value in report.items():
        print(f"{key:14} {value:.4f}" if isinstance(value, float) else f"{key:14} {value}")
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
        print(f"wrote {folder / 'report.json'}")


def list_data(arguments: argparse.Namespace) -> None:
    """jdm data list"""
    from jdm.data import DataError
    from jdm.data.datasets import DATASETS
    from jdm.data.prepare import mebibytes
    from jdm.data.records import is_prepared

    def prepared(name):
        try:
            return "yes" if is_prepared(name, arguments.data_dir) else "no"
        except DataError:
            return "in another format"

    row = "{:14} {:10} {:>8} {:>8}  {:32} {:>9}  {}"
    print(row.format("name", "pixels", "channels", "classes", "splits", "download", "prepared"))
    for facts in DATASETS.values():
        splits = [f"{name} {count:,}" for name, count in facts.splits.items()]
        print(
            row.format(
                facts.name,
                ", ".join(map(str, facts.sizes)),
                facts.channels,
                f"{facts.num_classes}{'*' * facts.multi_label}",
                ", ".join(splits),
                mebibytes(facts.download) if facts.download else "none",
                prepared(facts.name),
            ).rstrip()
        )
    print("* each of them a yes or a no; and folder:/path, with a sub-folder for each class")


def prepare_data(arguments: argparse.Namespace) -> None:
    """jdm data prepare"""
    from jdm.data import DataError
    from jdm.data.prepare import prepare

    _check_size(arguments.size)
    try:
        options = dict(size=arguments.size, skip_broken=arguments.skip_broken)
        path = prepare(arguments.name, arguments.data_dir, **options)
    except ValueError as error:
        raise UsageError(_flagged(error, arguments)) from error
    except DataError as error:
        raise Failure(error) from error
    print(f"{arguments.name} is prepared in {path}")


def show_data(arguments: argparse.Namespace) -> None:
    """jdm data show"""
    out = _writable("out", arguments.out)
    if out.suffix != ".png":
        raise UsageError(f"--out={out} must end in .png")
    _check_size(arguments.size)
    from jdm import plot
    from jdm.data import DataError
    from jdm.data.datasets import dataset
    from jdm.data.splits import load_split

    try:
        facts = dataset(arguments.name)
        size, channels = arguments.size or (facts.sizes or (64,))[0], facts.channels or 3
        images, labels = load_split(
            arguments.name, arguments.split, arguments.data_dir, size=size, channels=channels
        )
    except ValueError as error:
        raise UsageError(_flagged(error, arguments)) from error
    except DataError as error:
        raise Failure(error) from error
    picture, columns = plot.by_class(images, labels, rows=8)
    write_whole(out, plot.png(picture))
    print(f"wrote {columns} to {out}")


def convert(arguments: argparse.Namespace) -> None:
    """jdm convert"""
    given = {name for name in ("source", "to", "checkpoint") if getattr(arguments, name)}
    inwards = given == {"source"} and arguments.config and arguments.workdir
    outwards = given == {"checkpoint", "to"} and not arguments.config and not arguments.workdir
    if not inwards and not outwards:
        raise UsageError(
            "either --from, --config and --workdir, or --checkpoint and --to are needed"
        )
    config = configs.load(arguments.config, arguments.overrides) if inwards else None
    if outwards:
        _writable("to", arguments.to)

    from jdm import convert as files
    from jdm.checkpoint import CheckpointError

    options = dict(without_head=arguments.without_head)
    flag = "--workdir" if inwards else "--to"
    try:
        if inwards:
            files.check_workdir(Path(arguments.workdir))
            flag = "--from"
            files.from_file(arguments.source, config, arguments.workdir, **options)
            print(f"wrote the weights of {arguments.source} to {arguments.workdir}, as step 0")
        else:
            files.to_file(arguments.checkpoint, arguments.to, **options)
            print(f"wrote the weights of {arguments.checkpoint} to {arguments.to}")
    except files.ConvertError as error:
        for difference in error.differences:
            print(difference)
        raise UsageError(f"{flag}: {error}") from error
    except ValueError as error:
        raise configs.ConfigError(f"config.{error}") from error
    except CheckpointError as error:
        raise (UsageError(f"--checkpoint: {error}") if outwards else Failure(error)) from error
    except ImportError as error:
        raise Failure(error) from error


# What they share ---------------------------------------------------------------------------------


def _load(flag: str, path: str):
    """The Joint at the path that a flag names."""
    from jdm.checkpoint import CheckpointError
    from jdm.joint import load

    try:
        return load(path)
    except (CheckpointError, configs.ConfigError) as error:
        raise UsageError(f"--{flag}={path}: {error}") from error


def _flagged(error: ValueError, arguments: argparse.Namespace) -> str:
    """A complaint about a data set, with the flag that named it in front."""
    if str(error).startswith("split="):
        return f"--{error}"
    if getattr(arguments, "data", None):
        return f"--data={arguments.data}: {str(error).removeprefix('data.')}"
    named = getattr(arguments, "checkpoint", None)
    return f"--checkpoint={named}: config.{error}" if named else str(error).removeprefix("data.")


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise UsageError(f"--size={size} must be positive")


def _labels(asked: list[dict[int, float]], count: int, model):
    """What is asked, over and over until there are `count`, as jdm.sample takes it."""
    import numpy as np

    wrong = [label for one in asked for label in one if label >= model.num_classes]
    if wrong:
        raise ValueError(
            f"labels hold {wrong[0]}; this model knows the classes 0 to {model.num_classes - 1}"
        )
    if not model.multi_label and any(0 in one.values() for one in asked):
        raise ValueError("labels ask for a class to be off; this model knows one to an image")
    if len(asked) > count:
        raise ValueError(f"labels are {len(asked)} for {count} seeds; at most as many are allowed")
    asked = list(itertools.islice(itertools.cycle(asked), count))
    if not model.multi_label and all(list(one.values()) in ([], [1.0]) for one in asked):
        return [next(iter(one), None) for one in asked]
    rows = np.full((count, model.num_classes), -1.0 if model.multi_label else 0.0)
    for row, one in zip(rows, asked, strict=True):
        row[list(one)] = list(one.values())
    return rows


def _check_hosts(arguments: argparse.Namespace) -> None:
    given = (arguments.coordinator, arguments.hosts, arguments.host)
    if any(flag is not None for flag in given) and (None in given or not arguments.distributed):
        raise UsageError("--coordinator, --hosts and --host go together, with --distributed")
    if arguments.hosts is not None and not 0 <= arguments.host < arguments.hosts:
        raise UsageError(
            f"--host={arguments.host} must be one of --hosts={arguments.hosts}, from 0"
        )


def _join_hosts(arguments: argparse.Namespace) -> None:
    """Makes this process one of several, where it is said to be; waits for the others."""
    if not arguments.distributed:
        return
    import jax

    try:
        jax.distributed.initialize(arguments.coordinator, arguments.hosts, arguments.host)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Failure(f"the hosts did not come together: {reason}") from error


def _check_fits(joint, name: str, labels) -> None:
    """Raises ValueError where the labels of a data set are not what the model answers."""
    from jdm.data.datasets import dataset

    model, classes = joint.model, joint.config.data.classes
    asked = labels.shape[1] if labels.ndim > 1 else dataset(name).num_classes
    fits = asked == model.num_classes or (classes and asked > max(classes))
    if not fits or (labels.ndim == 2) != model.multi_label:
        raise ValueError(
            f"data.name={name!r} has {asked} classes; this model knows {model.num_classes}"
        )
    if not (labels >= 0).any():
        raise ValueError(f"data.name={name!r} has no labelled image in this split")


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the user has said where, or that not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jdm" / "xla"
    where = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    if "jax" in sys.modules:  # which read its environment when it was imported
        sys.modules["jax"].config.update("jax_compilation_cache_dir", where)


def _writable(flag: str, out: str) -> Path:
    path = Path(out)
    if not path.parent.is_dir():
        raise UsageError(f"--{flag}={out}: the folder {path.parent} does not exist")
    return path


COMMANDS = {
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "data list": list_data,
    "data prepare": prepare_data,
    "data show": show_data,
    "convert": convert,
}

if __name__ == "__main__":
    main()
