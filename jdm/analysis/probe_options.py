"""ProbeOptions: every option of `jdm probe`, declared once.

The flags are generated from the fields. This module does not import JAX, so that flags can be
checked before JAX is imported.
"""

import dataclasses
import typing
from typing import Any

from jdm.options import ANYTHING, POSITIVE, TUPLE, WHOLE, Option, Rule

# Of T. Three quarters of the levels are below T / 5: features for classes are best at little noise.
SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)

LEVELS = Rule(
    "one or more different whole numbers from 0 up",
    lambda v: len(set(v)) == len(v) > 0 and all(WHOLE.accepts(t) and t >= 0 for t in v),
)
BLOCKS = Rule("one or more different names", lambda v: len(set(v)) == len(v) > 0)
SEED = Rule("between 0 and 2147483647", lambda v: 0 <= v < 2**31)


def _field(default: Any, help: str, rule: Rule = ANYTHING, **facts: Any) -> Any:
    option = Option(default, help, rule, **facts)
    return dataclasses.field(default=default, metadata={"option": option})


@typing.no_type_check  # of the tests' run-time checker, so that Option.check reports wrong types
@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """What is probed, and on how many images. Raises InvalidValue for a wrong type or range.

    Which levels and blocks a model has is checked by `jdm.analysis.probe.check`.
    """

    levels: tuple[int, ...] | None = _field(
        None,
        "noise levels t, such as 0,5,10",
        LEVELS,
        kind=TUPLE,
        unset=f"0 and the shares {', '.join(map(str, SHARES[1:]))} of T",
    )
    blocks: tuple[str, ...] | None = _field(
        None, "blocks of the UNet, such as mid,decoder_1_0", BLOCKS, kind=TUPLE, unset="all"
    )
    images: int = _field(
        10_000,
        "the most training images that a probe is fitted on, of each class in proportion",
        POSITIVE,
    )
    seed: int = _field(0, "of the noise, and of the draw of training images", SEED)

    def __post_init__(self):
        for name, option in OPTIONS.items():
            option.check(name, getattr(self, name))


OPTIONS: dict[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(ProbeOptions)
}


def help_of(name: str) -> str:
    """The help of an option's flag."""
    option = OPTIONS[name]
    return f"{option.help} ({option.unset or option.default})"


def default_levels(steps: int) -> tuple[int, ...]:
    """SHARES of T, rounded to noise levels in [0, T); equal ones are one. steps: T."""
    return tuple(sorted({min(round(share * steps), steps - 1) for share in SHARES}))
