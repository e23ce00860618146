"""jdm data list"""

import argparse

from jdm.cli.shared import add_data_dir, data_dir

HELP = "List the known data sets."
EXAMPLE = "jdm data list"


def add_flags(command: argparse.ArgumentParser) -> None:
    add_data_dir(command)


def run(arguments: argparse.Namespace) -> None:
    from jdm.data import DataError
    from jdm.data.datasets import DATASETS
    from jdm.data.prepare import mebibytes
    from jdm.data.records import is_prepared

    where = data_dir(arguments)

    def prepared(name: str) -> str:
        try:
            return "yes" if is_prepared(name, where) else "no"
        except DataError:
            return "in another format"

    row = "{:14} {:10} {:>8} {:>8}  {:32} {:>9}  {}"
    print(row.format("name", "pixels", "channels", "classes", "splits", "download", "prepared"))
    for facts in DATASETS.values():
        sizes = ", ".join(map(str, facts.sizes))
        classes = f"{facts.num_classes}{'*' * facts.multi_label}"
        splits = ", ".join(f"{name} {count:,}" for name, count in facts.splits.items())
        download = mebibytes(facts.download) if facts.download else "none"
        cells = (facts.name, sizes, facts.channels, classes, splits, download, prepared(facts.name))
        print(row.format(*cells).rstrip())
    print("* attributes, each on or off; and folder:/path, with a sub-folder for each class")
