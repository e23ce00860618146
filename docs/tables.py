"""Writes the tables of the documentation that are made from the code.

    python docs/tables.py

A table is between <!-- table: NAME --> and <!-- end -->; a test fails where it is out of date.
"""

import re
from pathlib import Path

from jdm.analysis.explain_options import OPTIONS as EXPLAIN
from jdm.diffusion.method import OPTIONS
from jdm.options import table

FOLDER = Path(__file__).parent
TABLES = {"sampling.md": {"options": OPTIONS}, "explain.md": {"options": EXPLAIN}}


def written(page: str) -> str:
    """The text of a page with its tables made anew."""
    text = (FOLDER / page).read_text()
    for name, options in TABLES[page].items():
        found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.S)
        assert found, f"{page} has no table {name}"
        text = f"{text[: found.start(1)]}{table(options)}\n{text[found.end(1) :]}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (FOLDER / page).write_text(written(page))
