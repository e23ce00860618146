"""jdm eval"""

import argparse
import json
from pathlib import Path

from jdm import startup
from jdm.cli.shared import CHECKPOINT, add_other_data, data_dir, load_joint
from jdm.config import OPTIONS
from jdm.errors import InvalidValue
from jdm.files import local_path, write_whole
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
    add_other_data(command)


def run(arguments: argparse.Namespace) -> None:
    option = OPTIONS["eval.metrics"]
    metrics = arguments.metrics and option.read("metrics", arguments.metrics)
    if metrics is not None:
        option.check("metrics", metrics)
    folder = Path(local_path("out", arguments.out)) if arguments.out else None
    startup.set_up()
    from jdm.analysis.evaluators import EvaluationOptions, evaluate
    from jdm.data.fit import evaluation_options
    from jdm.data.identity import check_same, identity
    from jdm.data.lookup import dataset
    from jdm.data.splits import load_split, stored_split

    joint = load_joint("checkpoint", arguments.checkpoint)
    config, name = joint.config, arguments.data or joint.config.data.name
    try:
        options = evaluation_options(name, config.data, config.model, data_dir(arguments))
        split = load_split(name, arguments.split, options)
        if not arguments.other_data:
            stored = stored_split(dataset(name), arguments.split)
            now = identity(name, options, [stored])
            check_same(joint.dataset, now, "config.data.name", "evaluates")
    except InvalidValue as error:
        named = error.parameter == "config.data.name" and arguments.data
        raise (error.about("data") if named else error) from None
    evaluation = EvaluationOptions(config.eval.batch_size)
    found = dict(evaluate(joint, metrics or config.eval.metrics, split, evaluation))
    source = {"checkpoint": arguments.checkpoint, "data": name, "split": arguments.split}
    report = source | {"images": len(split.images)} | found
    if folder:  # before anything is printed, which may fail
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    for key, value in report.items():
        print(f"{key:14} {value:.4f}" if isinstance(value, float) else f"{key:14} {value}")
    if folder:
        say(f"wrote {folder / 'report.json'}", STDOUT)
