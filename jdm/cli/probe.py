"""jdm probe"""

import argparse
import dataclasses
import functools
from typing import TYPE_CHECKING

from jdm import startup
from jdm.analysis.probe_options import OPTIONS, ProbeOptions
from jdm.cli.shared import CHECKPOINT, add_data_dir, add_other_data, data_dir, load_joint
from jdm.config import OPTIONS as CONFIG
from jdm.errors import InvalidValue
from jdm.files import new_folder, whole_folder, write_whole
from jdm.messages import STDOUT, say
from jdm.names import SPLITS

if TYPE_CHECKING:
    from jdm.data.splits import ReadOptions
    from jdm.joint import Joint

HELP = "Measure what the representations know: probes by block and noise level."
EXAMPLE = "jdm probe --checkpoint=runs/digits --out=probe/"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    text = f"{CHECKPOINT}; several with commas between, or the flag again, for one picture"
    add("--checkpoint", action="append", required=True, help=text)
    text = "a new or empty folder for probe.json, probe.csv and probe.png"
    add("--out", required=True, help=text)
    for name, option in OPTIONS.items():
        add(f"--{name}", help=option.flag_help)
    add("--data", help="another data set of the same classes (that of the training)")
    text = "share of train to hold out, if there is no validation split (that of the training)"
    add("--validation", help=text)
    add_data_dir(command)
    add_other_data(command)


def run(arguments: argparse.Namespace) -> None:
    texts = {name: getattr(arguments, name) for name in OPTIONS}
    given = {k: OPTIONS[k].read(k, text) for k, text in texts.items() if text is not None}
    options = ProbeOptions(**given)
    share = CONFIG["data.validation"]
    validation = arguments.validation and share.read("validation", arguments.validation)
    if validation is not None:
        share.check("validation", validation)
    paths = [path for text in arguments.checkpoint for path in text.split(",")]
    if "" in paths or len(set(paths)) < len(paths):
        raise InvalidValue("checkpoint", ",".join(paths), "must be different paths")
    out = new_folder("out", arguments.out)
    folder = data_dir(arguments)
    startup.set_up()
    from jdm.analysis.probe import check, probe
    from jdm.analysis.probe_report import as_csv, as_json, as_png, as_text
    from jdm.data.splits import load_split

    joints = {path: load_joint("checkpoint", path) for path in paths}
    for path, joint in joints.items():
        try:
            check(joint, options)
        except InvalidValue as error:
            if error.parameter == "joint":
                raise InvalidValue("checkpoint", path, error.allowed) from None
            raise
    known = {joint.config.data.name for joint in joints.values()}
    if not arguments.data and len(known) > 1:
        said = f"were trained on different data: {', '.join(sorted(known))}"
        raise InvalidValue("checkpoint", ",".join(paths), said, "--data chooses one")
    name = arguments.data or known.pop()
    load = functools.cache(load_split)  # models of one data set read it once
    try:
        read = {
            path: _read_options(joint, name, folder, validation, not arguments.other_data)
            for path, joint in joints.items()
        }
        data = {path: {s: load(name, s, one) for s in SPLITS} for path, one in read.items()}
    except InvalidValue as error:
        named = error.parameter == "config.data.name" and arguments.data
        raise (error.about("data") if named else error) from None
    probes = {}
    # Made now, so that a folder that cannot be written is known at once.
    with whole_folder(out) as unfinished:
        for path, joint in joints.items():
            say(f"probing {path} on {name}")
            size = joint.config.eval.batch_size
            probes[path] = probe(joint, data[path], options, batch_size=size)
        source = {"data": name, "seed": options.seed, "most_training_images": options.images}
        write_whole(unfinished / "probe.json", as_json(probes, source))
        write_whole(unfinished / "probe.csv", as_csv(probes))
        write_whole(unfinished / "probe.png", as_png(probes))
    print(as_text(probes))
    say(f"wrote probe.json, probe.csv and probe.png to {out}", STDOUT)


def _read_options(
    joint: "Joint", name: str, folder: str, validation: float | None, same: bool
) -> "ReadOptions":
    """How a data set is read for a model. folder: of prepared data. validation: the share to hold
    out, None is that of the training. same: whether it must be the data of the training.

    Raises InvalidValue where it does not fit the model, or has not the three splits.
    """
    from jdm.data.fit import evaluation_options
    from jdm.data.identity import checked_contents
    from jdm.data.lookup import dataset
    from jdm.data.splits import split_names

    config, facts = joint.config, dataset(name)
    options = evaluation_options(name, config.data, config.model, folder)
    if validation is not None:
        options = dataclasses.replace(options, validation=validation)
    missing = [one for one in SPLITS if one not in split_names(facts, options.validation)]
    if missing:
        said = f"has no split {' or '.join(missing)}; a probe needs {', '.join(SPLITS)}"
        hint = "--validation=0.05 holds out a share of train" if "validation" in missing else ""
        raise InvalidValue("config.data.name", name, said, hint)
    checked_contents(joint.dataset if same else {}, name, options, SPLITS, "probes")
    return options
