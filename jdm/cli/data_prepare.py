"""jdm data prepare"""

import argparse

from jdm.cli.shared import add_data_dir, check_size
from jdm.errors import InvalidValue
from jdm.messages import STDOUT, say

HELP = "Download a data set, or read a folder of images, and store it for training."
EXAMPLE = "jdm data prepare cifar10; jdm data prepare folder:/path/of/images"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", help="a name of jdm data list, or folder:/path")
    text = "height and width in pixels to decode to (those of jdm data list; a folder has none)"
    add("--size", type=int, help=text)
    text = "a folder with the files that would be downloaded, for machines without a network"
    add("--from", dest="originals", default="", metavar="FOLDER", help=text)
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    add_data_dir(command)


def run(arguments: argparse.Namespace) -> None:
    check_size(arguments.size)
    from jdm.data.prepare import prepare

    options = dict(size=arguments.size, skip_broken=arguments.skip_broken)
    options["originals"] = arguments.originals
    try:
        path = prepare(arguments.name, arguments.data_dir, **options)
    except InvalidValue as error:
        raise (error.about("name") if error.parameter == "config.data.name" else error) from None
    say(f"{arguments.name} is prepared in {path}", STDOUT)
