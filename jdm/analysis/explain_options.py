"""ExplainOptions: how counterfactual images are searched for, declared once.

The flags of `jdm explain`, the signature and docstring of `jdm.explain` and the table in
docs/explain.md are generated from the fields. How the images are denoised is a Method. Imports no
JAX, so that flags can be checked first.
"""

import dataclasses
import typing

from jdm import names
from jdm.options import NUMBER, POSITIVE, SHARE, UNIT, Rule, check_fields, declared, options_of

FITTED = "fitted"  # the reference classifier of `jdm eval`, as a value of `reference`
AGAIN = 0.25  # of T: enough noise to remove what only the classifier sees, and to keep the class
# A mask finds images that only the classifier of clean images takes for the target.
NOISED = 0.95

RISING = Rule(
    "one or more shares above 0 and at most 1, in rising order",
    lambda v: (
        len(v) > 0
        and all(NUMBER.accepts(s) and SHARE.holds(s) for s in v)
        and all(a < b for a, b in zip(v, v[1:], strict=False))
    ),
)


@typing.no_type_check  # of the tests' run-time checker, so that Option.check reports wrong types
@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """How a counterfactual is searched for. Raises InvalidValue for a wrong type or range."""

    start: str = declared(
        "noise",
        "the noise an image is given: drawn from the seed, or that of its inversion by ddim",
        names=names.EXPLAIN_STARTS,
    )
    strengths: tuple[float, ...] = declared(
        (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "noise levels to start from, as shares of T; the first one that flips is taken",
        RISING,
    )
    shares: tuple[float, ...] = declared(
        (1.0,),
        "of the pixels that each step may change, those with the largest gradient; the first one "
        "that flips is taken",
        RISING,
    )
    draws: int = declared(
        6,
        "noises that are tried at each strength; of the results that flip, the one nearest to the "
        "image is taken",
        POSITIVE,
    )
    confidence: float = declared(0.99, "the probability that the target must reach", UNIT)
    again: float = declared(
        AGAIN,
        "noise level, as a share of T, after which the image, denoised again without guidance, "
        "must still show the target; 0: not required",
        UNIT,
    )
    noised: float | None = declared(
        None,
        "the probability that the target must reach, on average, in copies of the result that are "
        f"noised to the level again (to {AGAIN}, where that is 0)",
        UNIT,
        kind=NUMBER,
        unset=f"{NOISED} with shares below 1, or else 0",
    )

    def __post_init__(self):
        check_fields(self)

    @property
    def noised_confidence(self) -> float:
        """`noised`, or what it is left open for."""
        return NOISED * (self.shares != (1.0,)) if self.noised is None else self.noised


OPTIONS = options_of(ExplainOptions)
