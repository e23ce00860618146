"""jdm convert"""

import argparse

from jdm.cli.shared import CHECKPOINT, add_config, check_parent, load_joint
from jdm.config import load_config
from jdm.errors import NO_VALUE, InvalidValue
from jdm.messages import STDOUT, say
from jdm.names import WEIGHT_FILES

HELP = "Convert weights of the published PyTorch implementation to a work folder, or back."
EXAMPLE = (
    "jdm convert --from=model.pt --config=reference/cifar10 --workdir=runs/ported; "
    "jdm convert --checkpoint=runs/ported --to=model.safetensors"
)


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--from", dest="source", help=f"a file of a state_dict: {', '.join(WEIGHT_FILES)}")
    add_config(command, required=False)
    add("--workdir", help="the work folder to write: new, or empty")
    add("--checkpoint", help=CHECKPOINT)
    add("--to", help=f"the file to write: {', '.join(WEIGHT_FILES)}")
    text = "the file has no classifier: with --from the head is initialised, with --to left out"
    add("--without-head", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    names = ("source", "config", "workdir", "checkpoint", "to")
    given = {name for name in names if getattr(arguments, name)}
    options = dict(without_head=arguments.without_head)
    if given == {"source", "config", "workdir"}:
        config = load_config(arguments.config, arguments.overrides)
        from jdm.convert import from_file

        from_file(arguments.source, config, arguments.workdir, **options)
        say(f"wrote the weights of {arguments.source} to {arguments.workdir}, as step 0", STDOUT)
    elif given == {"checkpoint", "to"}:
        path = check_parent("to", arguments.to)
        from jdm.convert import file_format, to_file

        file_format("to", path)  # raises before the model is loaded
        to_file(load_joint("checkpoint", arguments.checkpoint), path, **options)
        say(f"wrote the weights of {arguments.checkpoint} to {arguments.to}", STDOUT)
    else:
        others = "either --from, --config and --workdir, or --checkpoint and --to are needed"
        raise InvalidValue("from", NO_VALUE, f"goes with other flags: {others}")
