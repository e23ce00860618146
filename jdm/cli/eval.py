"""jdm eval"""

import argparse
import datetime
import functools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jdm
from jdm import distributed, startup
from jdm.cli.shared import (
    CHECKPOINT,
    add_other_data,
    add_processes,
    data_dir,
    load_joint,
    processes_of,
    same_flags,
)
from jdm.config import OPTIONS
from jdm.diffusion import method
from jdm.diffusion.method import Method
from jdm.errors import NO_VALUE, InvalidValue
from jdm.files import local_path, made_folder, write_whole
from jdm.messages import STDOUT, say

if TYPE_CHECKING:
    from jdm.joint import Joint

HELP = "Evaluate a model: its classifier, its likelihoods and its samples."
EXAMPLE = "jdm eval --checkpoint=runs/digits --metrics=classification --out=report/"
OF_CONFIG = (
    "metrics",
    "samples",
    "features",
    "bound_steps",
    "ood",
)  # flags whose default is that of the config


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    add("--metrics", help=f"{OPTIONS['eval.metrics'].allowed} (those of the config)")
    add("--data", help="another data set of the same classes (that of the training)")
    add("--split", default="test", help="train, validation or test (test)")
    add("--data_dir", default="", help="the folder of prepared data (that of the training)")
    add("--ood", help="a data set of other images, for ood (that of the config)")
    add("--samples", help="images to generate, for generation (as many as the config says)")
    text = f"{OPTIONS['eval.features'].allowed}: of images, for distances (those of the config)"
    add("--features", help=text)
    text = "noise levels at which each image's bound is computed, for likelihood and ood; 0: all"
    add("--bound_steps", help=f"{text} (as many as the config says)")
    add("--seed", default="0", help="of all random draws; samples have the seeds from it on (0)")
    for name, option in method.OPTIONS.items():
        add(f"--{name}", help=f"of samples: {option.flag_help}")
    add("--out", help="a folder for report.json, report.md and report.html, which are replaced")
    add_other_data(command)
    add_processes(command)


def run(arguments: argparse.Namespace) -> None:
    given = {name: _read(f"eval.{name}", name, arguments) for name in OF_CONFIG}
    seed = _read("seed", "seed", arguments)
    texts = {name: getattr(arguments, name) for name in method.OPTIONS}
    read = {k: method.OPTIONS[k].read(k, text) for k, text in texts.items() if text is not None}
    sampling = method.method_of(None, read)
    out = local_path("out", arguments.out) if arguments.out else ""
    processes = processes_of(arguments)
    startup.set_up()
    with distributed.joined(processes, same_flags(arguments)):
        _evaluate(arguments, given, seed, sampling, out)


def _evaluate(
    arguments: argparse.Namespace, given: dict[str, Any], seed: int, sampling: Method, out: str
) -> None:
    """In all processes of a run. given: the flags of OF_CONFIG, checked. out: a path, or empty."""
    from jdm.analysis.evaluators import EvaluationOptions, evaluate_each
    from jdm.analysis.page import files
    from jdm.analysis.report import Report, lines
    from jdm.data.fit import evaluation_options, ood_options
    from jdm.data.identity import checked_contents
    from jdm.data.splits import cache_root, load_split

    main = distributed.is_main()
    joint = load_joint("checkpoint", arguments.checkpoint)
    config, where = joint.config, data_dir(arguments)
    name = arguments.data or config.data.name
    chosen = {k: config.eval[k] if value is None else value for k, value in given.items()}
    metrics, ood = chosen["metrics"], chosen["ood"]
    if "ood" in metrics and not ood:
        raise InvalidValue("ood", NO_VALUE, "must name a data set: --metrics has ood")
    try:
        options = evaluation_options(name, config.data, config.model, where)
        split = load_split(name, arguments.split, options)
        known = {} if arguments.other_data else joint.dataset
        (contents,) = checked_contents(known, name, options, [split.name], "evaluates").values()
    except InvalidValue as error:
        named = error.parameter == "config.data.name" and arguments.data
        raise (error.about("data") if named else error) from None
    second = ood_options(config.data, config.model, where)
    try:
        other = load_split(ood, arguments.split, second) if ood else None
    except InvalidValue as error:
        raise (error.about("ood") if error.parameter == "config.data.name" else error) from None
    _check_same("checkpoint", arguments.checkpoint, [joint.digest.encode()])
    _check_same("data", name, split)
    _check_same("ood", ood, other or ())
    folder = made_folder("out", out) if out and main else None
    evaluation = EvaluationOptions(
        config.eval.batch_size,
        load=functools.partial(load_split, name, options=options),
        other=other,
        samples=chosen["samples"],
        method=sampling,
        features=chosen["features"],
        cache=cache_root(options),
        seed=seed,
        bound_steps=chosen["bound_steps"] or None,
        shared=True,
    )
    protocol = _about(joint, arguments.checkpoint) | {
        "data": name,
        "contents": contents,
        "split": arguments.split,
        "images": len(split.images),
        "size": "×".join(map(str, joint.image_shape)),
        "seed": seed,
        "samples": chosen["samples"],
        "features": chosen["features"],
        "bound_steps": chosen["bound_steps"],
        "method": sampling.settings(),
        "ood": ood or None,
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    results: dict[str, Any] = {}
    if main:
        for key in ("checkpoint", "step", "data", "split", "images"):
            print(f"{key:14} {protocol[key]}")
    try:
        since = time.monotonic()
        say(f"evaluating: {', '.join(metrics)}")
        for evaluator, found in evaluate_each(joint, metrics, split, evaluation):
            results[evaluator] = found
            if main:
                print("\n".join(lines(found)), flush=True)
            say(f"{evaluator} took {time.monotonic() - since:.0f} s")
            since = time.monotonic()
    except BaseException:
        if results and folder:
            say(f"no report was written; what is printed of {', '.join(results)} is complete")
        raise
    if folder:
        for file, content in files(Report(protocol, results)).items():
            write_whole(folder / file, content)
        say(f"wrote report.json, report.md and report.html to {folder}", STDOUT)


def _check_same(flag: str, given: str, contents: Iterable[Any]) -> None:
    """Raises InvalidValue where this process has read other arrays than process 0."""
    from jdm.trees import digest

    if distributed.count() > 1 and not distributed.same_as_main(digest(contents).encode()):
        hint = (
            "while a training saves checkpoints, name one of them" if flag == "checkpoint" else ""
        )
        raise InvalidValue(flag, given, "holds something else here than in process 0", hint)


def _read(key: str, flag: str, arguments: argparse.Namespace) -> Any:
    """The value of a flag, checked as the config key; None where it is not given."""
    if (text := getattr(arguments, flag)) is None:
        return None
    option = OPTIONS[key]
    value = option.read(flag, text)
    option.check(flag, value)
    return value


def _about(joint: "Joint", path: str) -> dict[str, Any]:
    """The model, and what it is run with."""
    import jax

    devices, count = jax.devices(), distributed.count()
    return {
        "checkpoint": path,
        "step": joint.step,
        "weights": joint.digest,
        "dtype": joint.config.exec.dtype,
        "jdm": jdm.__version__,
        "jax": jax.__version__,
        "device": f"{len(devices)} × {devices[0].device_kind}"
        + (f", of {count} processes" if count > 1 else ""),
    }
