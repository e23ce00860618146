"""jdm push"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jdm import startup
from jdm.cli.shared import CHECKPOINT, load_joint
from jdm.errors import InvalidValue
from jdm.hub import address, check_token, push
from jdm.messages import STDOUT, say

if TYPE_CHECKING:
    from jdm.analysis.report import Report
    from jdm.joint import Joint

HELP = "Send a model to the Hugging Face Hub: its weights, its config and a model card."
EXAMPLE = "jdm push --checkpoint=runs/digits --to=hf://owner/name --private"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    text = "hf://owner/name, made if it does not exist, or hf://owner/name@branch of one that does"
    add("--to", required=True, help=text)
    text = "a new repository is visible to its owner alone; one that is public is refused"
    add("--private", action="store_true", help=text)
    text = "report.json of jdm eval for the model card (that of the work folder, where it has one)"
    add("--report", help=text)
    add("--license", help="the licence in the model card, such as apache-2.0 (none is named)")


def run(arguments: argparse.Namespace) -> None:
    at = address("to", arguments.to)
    if at is None:
        said = "is not the address of a model: hf://owner/name or hf://owner/name@branch"
        raise InvalidValue("to", arguments.to, said)
    check_token("to", at)
    startup.set_up()
    from jdm import model_file
    from jdm.analysis import publish

    joint = load_joint("checkpoint", arguments.checkpoint)
    report = _report(joint, arguments)
    public = report and publish.public_report(report, at)
    config, dataset = publish.public_config(joint), publish.public_dataset(joint)
    files = model_file.encode(joint.weights, config, dataset, joint.step, joint.digest)
    card = publish.card(joint, at, public, arguments.license)
    files[model_file.CARD] = card.encode()
    size = sum(map(len, files.values())) / 2**20
    say(f"sending {', '.join(sorted(files))} ({size:.1f} MiB) to {at}")
    why = f"Step {joint.step} of a jdm model, weights {joint.digest}"
    commit = push("to", at, files, arguments.private, why)
    say(f"sent {commit}; jdm.load({str(at)!r}) reads it", STDOUT)


def _report(joint: "Joint", arguments: argparse.Namespace) -> "Report | None":
    """The report of --report, or of the work folder; None where there is none of these weights."""
    from jdm.analysis.publish import check_report
    from jdm.analysis.report import REPORT, read

    if arguments.report:
        found = read("report", arguments.report)
        check_report(joint, found, arguments.report)
        return found
    beside = _work_folder(arguments.checkpoint) / REPORT
    if not beside.is_file():
        return None
    try:
        found = read("report", beside)
        check_report(joint, found, os.fspath(beside))
    except InvalidValue as error:
        say(f"the model card has no figures: {error}")
        return None
    return found


def _work_folder(path: str) -> Path:
    """The work folder of a checkpoint's path, which may not be one."""
    from jdm.hub import model_path

    found = Path(model_path("checkpoint", path))
    return found.parent.parent if found.parent.name == "checkpoints" else found
