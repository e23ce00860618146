"""jdm probe"""

import argparse
import functools

from jdm import startup
from jdm.analysis.probe_options import OPTIONS, ProbeOptions, help_of
from jdm.cli.shared import CHECKPOINT, add_data_dir, add_other_data, data_dir, load_joint
from jdm.errors import InvalidValue
from jdm.files import new_folder, whole_folder, write_whole
from jdm.messages import STDOUT, say
from jdm.names import SPLITS

HELP = "Measure what the representations know: probes by block and noise level."
EXAMPLE = "jdm probe --checkpoint=runs/digits --out=probe/"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    text = f"{CHECKPOINT}; several with commas between, or the flag again, for one picture"
    add("--checkpoint", action="append", required=True, help=text)
    text = "a new or empty folder for probe.json, probe.csv and probe.png"
    add("--out", required=True, help=text)
    for name in OPTIONS:
        add(f"--{name}", help=help_of(name))
    add("--data", help="another data set of the same classes (that of the training)")
    add_data_dir(command)
    add_other_data(command)


def run(arguments: argparse.Namespace) -> None:
    texts = {name: getattr(arguments, name) for name in OPTIONS}
    given = {k: OPTIONS[k].read(k, text) for k, text in texts.items() if text is not None}
    options = ProbeOptions(**given)
    paths = [path for text in arguments.checkpoint for path in text.split(",")]
    if "" in paths or len(set(paths)) < len(paths):
        raise InvalidValue("checkpoint", ",".join(paths), "must be different paths")
    out = new_folder("out", arguments.out)
    data_dir(arguments)
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
        read = {path: _read_options(joint, name, arguments) for path, joint in joints.items()}
        data = {path: {s: load(name, s, one) for s in SPLITS} for path, one in read.items()}
    except InvalidValue as error:
        named = error.parameter == "config.data.name" and arguments.data
        raise (error.about("data") if named else error) from None
    probes = {}
    with whole_folder(out) as folder:  # made now, so that what cannot be written is known at once
        for path, joint in joints.items():
            say(f"probing {path} on {name}")
            size = joint.config.eval.batch_size
            probes[path] = probe(joint, data[path], options, batch_size=size)
        source = {"data": name, "seed": options.seed, "most_training_images": options.images}
        write_whole(folder / "probe.json", as_json(probes, source))
        write_whole(folder / "probe.csv", as_csv(probes))
        write_whole(folder / "probe.png", as_png(probes))
    print(as_text(probes))
    say(f"wrote probe.json, probe.csv and probe.png to {out}", STDOUT)


def _read_options(joint, name: str, arguments: argparse.Namespace):
    """How the data set is read for a model. Raises InvalidValue where it does not fit the model, or
    has not the three splits."""
    from jdm.data.fit import evaluation_options
    from jdm.data.identity import check_same, identity
    from jdm.data.lookup import dataset
    from jdm.data.splits import split_names, stored_split

    config, facts = joint.config, dataset(name)
    options = evaluation_options(name, config.data, config.model, data_dir(arguments))
    missing = [s for s in SPLITS if s not in split_names(facts, options.validation)]
    if missing:
        said = f"has no split {' or '.join(missing)}; a probe needs {', '.join(SPLITS)}"
        raise InvalidValue("config.data.name", name, said)
    if not arguments.other_data:
        stored = sorted({stored_split(facts, split) for split in SPLITS})
        now = identity(name, options, stored)
        check_same(joint.dataset, now, "config.data.name", "probes")
    return options
