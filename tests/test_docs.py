"""The documentation against the code."""

import importlib.util
from pathlib import Path

import pytest

import jdm
from jdm.diffusion.method import OPTIONS

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.TABLES)
def test_tables_are_up_to_date(page):
    """Where not: python docs/tables.py."""
    assert (ROOT / "docs" / page).read_text() == tables.written(page)


def test_the_docstring_of_sample_lists_every_option():
    for name, option in OPTIONS.items():
        assert f"{name}: {option.help}" in jdm.sample.__doc__
