"""Writes the tables of the documentation that are made from the code.

    python docs/tables.py

A table is between <!-- table: NAME --> and <!-- end -->; a test fails where it is out of date.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

from jdm.analysis.explain_options import OPTIONS as EXPLAIN
from jdm.configs.base import KEYS
from jdm.diffusion.method import OPTIONS
from jdm.options import Option, table
from jdm.serve.options import OPTIONS as SERVE

FOLDER = Path(__file__).parent


def keys_table(section: str) -> str:
    """The config keys of a section as a table in Markdown; "" for those outside all sections."""
    found = KEYS[section] if section else {k: v for k, v in KEYS.items() if isinstance(v, Option)}
    assert isinstance(found, dict)
    prefix = f"{section}." if section else ""
    rows = [
        f"| `{prefix}{name}` | {_code(one.default)} | {one.allowed} | {one.help} | "
        f"{'yes' if one.resumable else ''} |"
        for name, one in found.items()
        if isinstance(one, Option)
    ]
    titles = ("key", "default", "allowed", "what it is", "may change on resuming")
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    return "\n".join([head, *rows])


def _code(value: object) -> str:
    return f"`{value!r}`".replace("'", '"')


SECTIONS = ("", *(name for name, one in KEYS.items() if isinstance(one, dict)))
# {page: {name of the table: what makes it}}
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "sampling.md": {"options": functools.partial(table, OPTIONS)},
    "explain.md": {"options": functools.partial(table, EXPLAIN)},
    "config.md": {name or "top": functools.partial(keys_table, name) for name in SECTIONS},
    "serve.md": {"options": functools.partial(table, SERVE)},
}


def written(page: str) -> str:
    """The text of a page with its tables made anew."""
    text = (FOLDER / page).read_text()
    for name, make in TABLES[page].items():
        found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.S)
        assert found, f"{page} has no table {name}"
        text = f"{text[: found.start(1)]}{make()}\n{text[found.end(1) :]}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (FOLDER / page).write_text(written(page))
