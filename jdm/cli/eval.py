"""jdm eval"""

import argparse
import json
from pathlib import Path

from jdm.cli import use_compilation_cache
from jdm.cli.shared import CHECKPOINT, load_joint
from jdm.config import OPTIONS
from jdm.errors import InvalidValue
from jdm.files import write_whole
from jdm.messages import STDOUT, say

HELP = "Evaluate a model: accuracy and cross-entropy."
EXAMPLE = "jdm eval --checkpoint=runs/digits --out=report/"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    add("--metrics", help=f"{OPTIONS['eval.metrics'].allowed} (those of the config)")
    add("--data", help="another data set of the same classes (that of the training)")
    add("--split", default="test", help="train, validation or test (test)")
    add("--data_dir", default="", help="the folder of prepared data (that of the training)")
    add("--out", help="a folder for report.json")


def run(arguments: argparse.Namespace) -> None:
    option = OPTIONS["eval.metrics"]
    metrics = arguments.metrics and option.read("metrics", arguments.metrics)
    if metrics is not None:
        option.check("metrics", metrics)
    use_compilation_cache()
    from jdm.analysis.evaluators import EvaluationOptions, evaluate
    from jdm.data.fit import evaluation_options
    from jdm.data.splits import load_split

    joint = load_joint("checkpoint", arguments.checkpoint)
    config, name = joint.config, arguments.data or joint.config.data.name
    try:
        options = evaluation_options(name, config.data, config.model, arguments.data_dir)
        split = load_split(name, arguments.split, options)
    except InvalidValue as error:
        named = error.parameter == "config.data.name" and arguments.data
        raise (error.about("data") if named else error) from None
    evaluation = EvaluationOptions(config.eval.batch_size)
    found = dict(evaluate(joint, metrics or config.eval.metrics, split, evaluation))
    source = {"checkpoint": arguments.checkpoint, "data": name, "split": arguments.split}
    report = source | {"images": len(split.images)} | found
    if arguments.out:  # before anything is printed, which may fail
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    for key, value in report.items():
        print(f"{key:14} {value:.4f}" if isinstance(value, float) else f"{key:14} {value}")
    if arguments.out:
        say(f"wrote {folder / 'report.json'}", STDOUT)
