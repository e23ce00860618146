"""jdm data show"""

import argparse

from jdm.cli.shared import add_data_dir, check_parent, check_size, data_dir
from jdm.errors import InvalidValue
from jdm.files import write_whole
from jdm.messages import STDOUT, say

HELP = "Draw a picture of a data set, with a column for each class."
EXAMPLE = "jdm data show cifar10 --out=grid.png"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", help="a name of jdm data list, or folder:/path")
    add("--split", default="train", help="train, validation or test (train)")
    add("--size", type=int, help="height and width in pixels (those of the data set)")
    add("--out", default="grid.png", help="a .png file (grid.png)")
    add_data_dir(command)


def run(arguments: argparse.Namespace) -> None:
    out = check_parent("out", arguments.out)
    if out.suffix != ".png":
        raise InvalidValue("out", arguments.out, "must end in .png")
    check_size(arguments.size)
    from jdm import plot
    from jdm.data.lookup import dataset
    from jdm.data.records import Records
    from jdm.data.splits import ReadOptions, load_split, stored_split

    try:
        facts = dataset(arguments.name)
        size, channels = arguments.size or (facts.sizes or (64,))[0], facts.channels or 3
        options = ReadOptions(data_dir=data_dir(arguments), size=size, channels=channels)
        split = load_split(arguments.name, arguments.split, options)
        names = Records(facts, stored_split(facts, arguments.split), options.data_dir).class_names
    except InvalidValue as error:
        raise (error.about("name") if error.parameter == "config.data.name" else error) from None
    picture, columns = plot.by_class(split.images, split.labels, rows=8)
    write_whole(out, plot.png(picture))
    say(f"wrote {columns} to {out}", STDOUT)
    say(f"classes: {', '.join(f'{k} {name}' for k, name in enumerate(names))}", STDOUT)
