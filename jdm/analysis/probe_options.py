"""ProbeOptions: every option of `jdm probe`, declared once.

The flags are generated from the fields. This module does not import JAX, so that flags can be
checked before JAX is imported.
"""

import dataclasses
import typing

from jdm.options import POSITIVE, TUPLE, WHOLE, Rule, check_fields, declared, options_of

# Of T. Three quarters of the levels are below T / 5: features for classes are best at little noise.
SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)

LEVELS = Rule(
    "one or more different whole numbers from 0 up",
    lambda v: len(set(v)) == len(v) > 0 and all(WHOLE.accepts(t) and t >= 0 for t in v),
)
BLOCKS = Rule("one or more different names", lambda v: len(set(v)) == len(v) > 0)
SEED = Rule("between 0 and 2147483647", lambda v: 0 <= v < 2**31)


@typing.no_type_check  # of the tests' run-time checker, so that Option.check reports wrong types
@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """What is probed, and on how many images. Raises InvalidValue for a wrong type or range.

    Which levels and blocks a model has is checked by `jdm.analysis.probe.check`.
    """

    levels: tuple[int, ...] | None = declared(
        None,
        "noise levels t, such as 0,5,10",
        LEVELS,
        kind=TUPLE,
        unset=f"0 and the shares {', '.join(map(str, SHARES[1:]))} of T",
    )
    blocks: tuple[str, ...] | None = declared(
        None, "blocks of the UNet, such as mid,decoder_1_0", BLOCKS, kind=TUPLE, unset="all"
    )
    images: int = declared(
        10_000,
        "the most training images that a probe is fitted on, of each class in proportion",
        POSITIVE,
    )
    seed: int = declared(0, "of the noise, and of the draw of training images", SEED)

    def __post_init__(self):
        check_fields(self)


OPTIONS = options_of(ProbeOptions)


def default_levels(steps: int) -> tuple[int, ...]:
    """SHARES of T, rounded to noise levels in [0, T); equal ones are one. steps: T."""
    return tuple(sorted({min(round(share * steps), steps - 1) for share in SHARES}))
