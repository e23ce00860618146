"""The errors that users see."""

from collections.abc import Sequence
from typing import Any

NO_VALUE: Any = object()  # for an InvalidValue whose sentence names no single value


def first_ten(lines: Sequence[str]) -> list[str]:
    """A list for a person to read: at most ten lines, then how many more there are."""
    more = len(lines) - 10
    return [*lines[:10], *([f"and {more} more"] if more > 0 else [])]


class InvalidValue(ValueError):
    """An argument, flag or config key whose value is not allowed; `str` of it is one sentence.

    It carries the parts of the sentence, so that the command line can name the flag instead.
    parameter: the name of a Python argument ("steps"), or the full name of a config key
    ("config.optim.lr"). value: what was given, or NO_VALUE. allowed: the rest of a sentence that
    begins with the parameter and its value: "must be positive". hint: advice, added to the
    sentence. details: further lines; the command line prints the first ten before the sentence.
    """

    def __init__(
        self, parameter: str, value: Any, allowed: str, hint: str = "", details: tuple = ()
    ):
        super().__init__(parameter, value, allowed, hint, details)
        self.parameter, self.value, self.allowed = parameter, value, allowed
        self.hint, self.details = hint, details

    def sentence(self, name: str) -> str:
        """The sentence, with this name for the parameter."""
        value = "" if self.value is NO_VALUE else f"={self.value!r}"
        return f"{name}{value} {self.allowed}" + (f"; {self.hint}" if self.hint else "")

    def __str__(self) -> str:
        return self.sentence(self.parameter)

    def about(self, parameter: str) -> "InvalidValue":
        """The same error with another parameter, such as the flag that set a config key."""
        return InvalidValue(parameter, self.value, self.allowed, self.hint, self.details)


class Failure(RuntimeError):
    """What no check of the arguments could foresee, in one sentence: a disk that is full, a file
    that is damaged, a loss that is not finite. status: the exit status of a command it ends."""

    status = 1
