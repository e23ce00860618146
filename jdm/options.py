"""Option: the default, the help and the allowed values of a config key or an option of sampling.

Config keys are declared in jdm.configs.base. The options of a job, such as sampling, are fields of
a frozen dataclass, such as jdm.diffusion.method.Method. Flags, checks, signatures and tables of the
documentation are generated from these declarations.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from jdm.errors import InvalidValue
from jdm.names import FOLDER, Names, check_name


class Rule(NamedTuple):
    """A condition on values. words: in words, "positive". holds: value -> bool."""

    words: str
    holds: Callable[[Any], bool]


ANYTHING = Rule("anything", lambda v: True)
POSITIVE = Rule("positive", lambda v: v > 0)
NOT_NEGATIVE = Rule("0 or more", lambda v: v >= 0)
FRACTION = Rule("at least 0 and below 1", lambda v: 0 <= v < 1)
SHARE = Rule("above 0 and at most 1", lambda v: 0 < v <= 1)
FLOAT32 = Rule("finite as float32", lambda v: abs(v) <= 3.4028234e38)
UNIT = Rule("between 0 and 1", lambda v: 0 <= v <= 1)


def _tuple(text: str) -> tuple:
    """ "(1, 2)", "1,2" or "a,b"; "()" and "" are empty."""
    if not text.strip():
        return ()
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(part.strip() for part in text.split(","))
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def is_float(array: Any) -> bool:
    """Whether an array holds floats of any precision; NumPy does not count bfloat16 as one."""
    return "float" in array.dtype.name


class Kind(NamedTuple):
    """An option's type. words: its name in errors. accepts: value -> bool. read: text -> value."""

    words: str
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any]


WHOLE = Kind("a whole number", lambda v: isinstance(v, Integral) and not isinstance(v, bool), int)
NUMBER = Kind("a number", lambda v: isinstance(v, Real) and not isinstance(v, bool), float)
TRUTH = Kind(
    "True or False",
    lambda v: isinstance(v, bool),
    lambda text: {"true": True, "false": False}[text.lower()],
)
TEXT = Kind("text", lambda v: isinstance(v, str), str)
TUPLE = Kind("a list", lambda v: isinstance(v, tuple), _tuple)
COUNT = Kind(
    "a whole number, or section counts such as 10,10,20",
    lambda v: WHOLE.accepts(v) or TEXT.accepts(v),
    lambda text: int(text) if text.isdecimal() else text,
)
_KINDS = {int: WHOLE, float: NUMBER, bool: TRUTH, str: TEXT, tuple: TUPLE}


def _is_finite(value: Any) -> bool:
    """Of a number: whether it is neither a NaN nor larger than any float, as a whole number may."""
    return -sys.float_info.max <= value <= sys.float_info.max


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    help: one line. rule: the condition on its value. names: the closed set of its value or, for a
    tuple, of each entry. folder: whether "", and "folder:" with a path, are allowed besides names.
    kind: its type; None is the type of the default. resumable: whether a resumed run may change the
    value; for config keys. unset: how the help describes the default None.
    """

    default: Any
    help: str
    rule: Rule = ANYTHING
    names: Names | None = None
    folder: bool = False
    kind: Kind | None = None
    resumable: bool = False
    unset: str = ""

    @property
    def type(self) -> Kind:
        return self.kind or _KINDS[type(self.default)]

    def check(self, parameter: str, value: Any) -> None:
        """Raises InvalidValue for a value that is not allowed. parameter: its name in the error."""
        if value is None and self.default is None:
            return
        if not self.type.accepts(value):
            raise InvalidValue(parameter, value, f"must be {self.type.words}")
        if isinstance(value, Real) and not _is_finite(value):
            raise InvalidValue(parameter, value, "must be finite")
        for one in value if isinstance(value, tuple) else (value,):
            folder = self.folder and one.startswith(FOLDER)
            if self.names and one != self.default and not folder:
                check_name(parameter, one, self._known)
        if not self.rule.holds(value):
            raise InvalidValue(parameter, value, f"must be {self.rule.words}")

    def read(self, parameter: str, text: str) -> Any:
        """The value that a text stands for. Raises InvalidValue for a text of another type."""
        try:
            return self.type.read(text)
        except (ValueError, KeyError):
            raise InvalidValue(parameter, text, f"must be {self.type.words}") from None

    @property
    def allowed(self) -> str:
        """What is allowed, for help and tables; "" where everything is."""
        if self.names:
            return ", ".join(self._known)
        return "" if self.rule is ANYTHING else self.rule.words

    @property
    def shown_default(self) -> str:
        """The default, for help and tables."""
        return self.unset or str(self.default)

    @property
    def flag_help(self) -> str:
        """The help of the option's flag."""
        return f"{self.help}{f'; {self.allowed}' if self.names else ''} ({self.shown_default})"

    @property
    def _known(self) -> list[str]:
        return [*(self.names or ()), *([f"{FOLDER}/path"] if self.folder else [])]


def declared(default: Any, help: str, rule: Rule = ANYTHING, **facts: Any) -> Any:
    """An option as a field of a dataclass. facts: further fields of Option."""
    option = Option(default, help, rule, **facts)
    return dataclasses.field(default=default, metadata={"option": option})


def options_of(cls: Any) -> dict[str, Option]:
    """The options that are the fields of a dataclass, by name."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}


def check_fields(values: Any) -> None:
    """Raises InvalidValue for a field of such a dataclass whose value is not allowed."""
    for name, option in options_of(type(values)).items():
        option.check(name, getattr(values, name))


def takes(
    options: Mapping[str, Option],
    described_here: Mapping[str, Option],
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable], Callable]:
    """A decorator that adds options to the signature of a function, in place of its **options.

    described_here: those that are described in its docstring, in place of the word OPTIONS.
    defaults: of some options, where those of the function are not the declared ones.
    """
    kind, own = inspect.Parameter.KEYWORD_ONLY, defaults or {}

    def decorated(function: Callable) -> Callable:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, kind, default=own.get(name, option.default))
            for name, option in options.items()
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        if function.__doc__:
            lines = textwrap.indent(described(described_here), "    ").strip()
            function.__doc__ = function.__doc__.replace("OPTIONS", lines)
        return function

    return decorated


def plain_number(value: Any) -> Any:
    """A NumPy or JAX scalar as a Python number, for JSON; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def described(options: Mapping[str, Option]) -> str:
    """One line for each option, for a docstring."""
    return "\n".join(f"{name}: {one.help} ({one.shown_default})." for name, one in options.items())


def table(options: dict[str, Option]) -> str:
    """The options as a table in Markdown."""
    rows = [
        f"| `{name}` | {one.shown_default} | {one.allowed} | {one.help} |"
        for name, one in options.items()
    ]
    return "\n".join(["| option | default | allowed | what it is |", "|---|---|---|---|", *rows])
