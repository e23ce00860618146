"""The documentation against the code."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import jdm
from jdm import cli
from jdm.config import load_config
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


def commands() -> list[list[str]]:
    """The commands in the code blocks of README.md and docs/*.md, in words."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"; (?:do|done)|&&", line):
                    if part.strip().startswith(("jdm ", "python ")):
                        found.append(shlex.split(part, comments=True))
    return found


def test_every_command_of_the_docs_is_whole():
    """It parses, its config loads and its benchmark has the flags; nothing is left out as "…"."""
    found, parser = commands(), cli.parser()
    assert len(found) > 20
    for words in found:
        assert "…" not in " ".join(words), words
        if words[0] == "jdm":
            overrides = [word for word in words if word.startswith("--config.")]
            given = parser.parse_args([word for word in words[1:] if word not in overrides])
            config = getattr(given, "config", None)
            if config and not config.endswith(".py"):
                load_config(config, overrides)
        else:
            source = (ROOT / words[1]).read_text()
            if "add_flags(parser" in source:  # flags that two scripts share
                source += (ROOT / "benchmarks" / "twins.py").read_text()
            for flag in (word.partition("=")[0] for word in words[2:] if word[0] == "-"):
                assert f'"{flag}"' in source, words
