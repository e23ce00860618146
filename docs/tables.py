"""Writes the tables of the documentation that are made from the code.

    python docs/tables.py

A table is between <!-- table: NAME --> and <!-- end -->; a test fails where it is out of date.
"""

import re
from pathlib import Path

from jdm.diffusion.method import table as options_of_sampling

FOLDER = Path(__file__).parent
TABLES = {"sampling.md": {"options": options_of_sampling}}


def written(page: str) -> str:
    """The text of a page with its tables made anew."""
    text = (FOLDER / page).read_text()
    for name, table in TABLES[page].items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m: f"{m[1]}{table()}\n{m[2]}", text, flags=re.S)  # noqa: B023
        assert found == 1, f"{page} has no table {name}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (FOLDER / page).write_text(written(page))
