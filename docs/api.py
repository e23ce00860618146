"""The reference of the public names, in Markdown, from their signatures and docstrings.

Public are the names in jdm.__all__, and the methods and properties of the classes among them that
do not begin with an underscore. One without a docstring is an error.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import jdm


class MissingDocstringError(Exception):
    """Public names without a docstring; the message lists them."""


def public() -> Iterator[tuple[str, Any]]:
    """(name, object) of all public names: "jdm.load", "jdm.Joint", "jdm.Joint.denoise", …"""
    for name in jdm.__all__:
        found = getattr(jdm, name)
        yield f"jdm.{name}", found
        if inspect.isclass(found):
            fields = {one.name for one in dataclasses.fields(found)}
            for member, value in vars(found).items():
                described = callable(value) or isinstance(value, property) or hasattr(value, "func")
                if described and not member.startswith("_") and member not in fields:
                    yield f"jdm.{name}.{member}", value


def docstring(found: Any) -> str:
    """The docstring of an object's own; "" where it has none, or only the one of a dataclass."""
    own = getattr(found, "__doc__", None) or ""
    generated = dataclasses.is_dataclass(found) and own.startswith(f"{found.__name__}(")
    return "" if generated else inspect.cleandoc(own)


def undocumented() -> list[str]:
    """The public names that have no docstring."""
    return [name for name, found in public() if not docstring(found)]


def signature(name: str, found: Any) -> str:
    """The call, as one line a parameter where there are several; the name alone of a property."""
    if not callable(found):
        return name.removeprefix("jdm.")
    rows, keyword = [], False
    for one in inspect.signature(found).parameters.values():
        if one.name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not keyword:
            rows, keyword = [*rows, "*"], True
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        default = "" if one.default is one.empty else f"={one.default!r}"
        rows.append(f"{stars}{one.name}{default}")
    line = f"{name}({', '.join(rows)})"
    return line if len(line) < 90 else f"{name}(\n    " + ",\n    ".join(rows) + ",\n)"


def markdown(text: str) -> str:
    """A docstring as Markdown: lines "name: …" begin a line of their own; code stays code."""
    parts = []
    for part in re.split(r"\n\s*\n", text):
        lines = part.splitlines()
        if all(line.startswith("    ") for line in lines):
            parts.append(f"```python\n{textwrap.dedent(part)}\n```")
            continue
        escaped = re.sub(r"(?<!`)([*<>])(?!`)", r"\\\1", part)
        # A sentence that begins with "name: " describes a parameter.
        escaped = re.sub(r"(^|(?<=[.;?] )|(?<=\.\n))((?:\w+, )*\w+): ", r"\n- **\2**: ", escaped)
        parts.append(escaped.strip())
    return "\n\n".join(parts)


def reference() -> str:
    """A section for each public name. Raises MissingDocstringError."""
    if missing := undocumented():
        raise MissingDocstringError(f"without a docstring: {', '.join(missing)}")
    parts = []
    for name, found in public():
        level = "##" if name.count(".") == 1 else "###"
        call = signature(name, found)
        parts += [f"{level} {name}", f"```python\n{call}\n```", markdown(docstring(found))]
    return "\n\n".join(parts)
