"""jdm compare"""

import argparse

from jdm.cli.shared import check_parent
from jdm.errors import NO_VALUE, InvalidValue
from jdm.files import write_whole
from jdm.messages import STDOUT, say

HELP = "Show reports of jdm eval side by side."
EXAMPLE = "jdm compare runs/a/report runs/b/report --out=compare.html"


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("reports", nargs="+", help="two or more folders of jdm eval --out, or files report.json")
    add("--out", help="a .png with a figure, or a .html with the table too")


def run(arguments: argparse.Namespace) -> None:
    paths = arguments.reports
    if len(set(paths)) < max(2, len(paths)):
        raise InvalidValue("reports", NO_VALUE, "must be two or more different ones")
    out = arguments.out and check_parent("out", arguments.out)
    if out and out.suffix not in (".png", ".html"):
        raise InvalidValue("out", arguments.out, "must end in .png or .html")
    from jdm.analysis import comparison
    from jdm.analysis.report import read, table

    reports = {path: read("reports", path) for path in paths}
    rows = comparison.compared(reports)
    if len(rows) == 1:
        raise InvalidValue("reports", NO_VALUE, "hold no number to compare")
    for path, report in reports.items():
        print(f"{path}: {report.title}")
    for sentence in comparison.differences(reports):
        print(sentence)
    print("\n".join(["", *table(rows)[:-1]]))
    if out:
        html = out.suffix == ".html"
        write_whole(out, comparison.html(reports) if html else comparison.picture(reports).light)
        say(f"wrote {out}", STDOUT)
