"""Timesteps: which of the T noise levels a sampler visits."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Int

from jdm import names
from jdm.diffusion.process import Diffusion
from jdm.errors import InvalidValue

Timesteps = Int[np.ndarray, " steps"]  # decreasing
AnyTimesteps = Timesteps | Int[Array, " steps"]  # the latter may be traced
Measure = Float[np.ndarray, " t"]

# The quantity in which the timesteps are evenly spaced, as a function of abar: float64 [T] -> [T],
# increasing. None is t itself, rounded as in the published code.
SPACINGS: dict[str, Callable[[Measure], Measure] | None] = names.SPACINGS.records(
    uniform=None,
    quadratic=lambda abar: np.sqrt(np.arange(len(abar))),  # Song et al. 2021, appendix D.2
    log_snr=lambda abar: np.log(1 - abar) - np.log(abar),  # Lu et al. 2022, section 5
)


def timesteps(
    diffusion: Diffusion, steps: int | str, spacing: str = "uniform", total: int | None = None
) -> Timesteps:
    """The timesteps that a sampler visits, int32, decreasing from total - 1 to 0.

    steps: the number of timesteps, in [1, total]; a single one is total - 1 (0 in the published
    code). Or, with uniform spacing, a count for each section, such as "10,10,20": [0, total) is
    split into sections of equal length, the least noisy first, and the timesteps of each are evenly
    spaced from its first to its last (a count of 1 takes the first). spacing: one of SPACINGS;
    "quadratic" and "log_snr" take more timesteps near the clean image. total: the number of noise
    levels to sample; T by default, fewer for an image that is only partly noised.

    Raises InvalidValue for an unknown spacing, a total outside [1, T], and a count below 1 or above
    the length of its section.
    """
    total = diffusion.steps if total is None else total
    if not 1 <= total <= diffusion.steps:
        allowed = f"must lie between 1 and diffusion.steps={diffusion.steps}"
        raise InvalidValue("total", total, allowed)
    measure = SPACINGS[names.check_name("spacing", spacing, SPACINGS)]
    try:
        counts = [int(count) for count in str(steps).split(",")]
    except ValueError:
        allowed = "must be a whole number, or section counts such as 10,10,20"
        raise InvalidValue("steps", steps, allowed) from None
    chain = "diffusion.steps=" if total == diffusion.steps else "the times that are left, "
    if len(counts) == 1 and not 1 <= counts[0] <= total:
        raise InvalidValue("steps", steps, f"must lie between 1 and {chain}{total}")
    if counts == [1]:
        return np.array([total - 1], np.int32)
    if measure is not None:
        if len(counts) > 1:
            allowed = f"has section counts, which spacing={spacing!r} does not take"
            raise InvalidValue("steps", steps, allowed, "take spacing='uniform'")
        return _evenly_spaced(measure(diffusion.abar[:total]), counts[0])
    times = []
    for section, count in zip(np.array_split(np.arange(total), len(counts)), counts, strict=True):
        if not 1 <= count <= len(section):
            allowed = f"asks for {count} of the {len(section)} times of a section"
            hint = f"a count must be at least 1 and fit one of {len(counts)} equal sections of "
            raise InvalidValue("steps", steps, allowed, f"{hint}{chain}{total}")
        # A running sum, as published: a product could round an exact half the other way.
        stride = (len(section) - 1) / max(count - 1, 1)
        times += [*section[0] + np.cumsum([0.0] + [stride] * (count - 1)).round()]
    return np.array(times[::-1], np.int32)


def _evenly_spaced(measure: Measure, count: int) -> Timesteps:
    """`count` >= 2 different times, decreasing, evenly spaced in `measure` up to rounding.

    Where two would round to the same time, one moves to the next free time: toward the noise, or,
    at the noisy end, toward the image.
    """
    even = np.linspace(measure[0], measure[-1], count)
    times = np.interp(even, measure, np.arange(len(measure))).round().astype(np.int32)
    i = np.arange(count, dtype=np.int32)
    times = np.maximum.accumulate(times - i) + i  # each at least one above the one before
    return np.minimum(times, len(measure) - count + i)[::-1]
