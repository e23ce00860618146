"""Which of the T times of the original chain are visited."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from jdm.diffusion.process import Diffusion, pick

# What the visited times are even in: abar float64 [T] -> an increasing [T].
SPACINGS: dict[str, Callable[[Float[np.ndarray, " t"]], Float[np.ndarray, " t"]]] = {
    "uniform": lambda abar: np.arange(len(abar), dtype=np.float64),
    "quadratic": lambda abar: np.sqrt(np.arange(len(abar))),  # Song et al. 2021, appendix D.2
    "log_snr": lambda abar: np.log(1 - abar) - np.log(abar),  # Lu et al. 2022, section 5
}


def timesteps(
    diffusion: Diffusion, steps: int | str, spacing: str = "uniform", total: int | None = None
) -> Int[np.ndarray, " steps"]:
    """The times that are visited, from the noisiest down: from total - 1 to 0.

    steps: how many, between 1 and total, all different; or, evenly spaced, how many of each
    section, such as "10,10,20": the chain is cut into sections as long as each other, the least
    noisy first, and each is visited evenly from its first time to its last (a section of one at its
    first). spacing: one of SPACINGS; uniform is the one of the published code, to the same
    rounding. "quadratic" and "log_snr" visit more of the times near the image. total: T, or how
    much of the chain is left where the start is not pure noise. A single step is at total - 1,
    where the published code has it at 0.

    Raises ValueError for an unknown spacing, a total outside [1, T], and a count below 1 or above
    the length of its section.
    """
    total = diffusion.steps if total is None else total
    if not 1 <= total <= diffusion.steps:
        raise ValueError(f"total={total} must lie between 1 and diffusion.steps={diffusion.steps}")
    pick("spacing", spacing, SPACINGS)
    try:
        counts = [int(count) for count in str(steps).split(",")]
    except ValueError:
        raise ValueError(
            f"steps={steps} must be a whole number, or section counts such as 10,10,20"
        ) from None
    chain = "diffusion.steps=" if total == diffusion.steps else "the times that are left, "
    if len(counts) == 1 and not 1 <= counts[0] <= total:
        raise ValueError(f"steps={steps} must lie between 1 and {chain}{total}")
    if counts == [1]:
        return np.array([total - 1], np.int32)
    if spacing != "uniform":
        if len(counts) > 1:
            raise ValueError(f"steps={steps}: section counts go with spacing='uniform' alone")
        return _even_in(SPACINGS[spacing](diffusion.abar[:total]), counts[0])
    times = []
    for section, count in zip(np.array_split(np.arange(total), len(counts)), counts, strict=True):
        if not 1 <= count <= len(section):
            raise ValueError(
                f"steps={steps} asks for {count} of the {len(section)} times of a section; between "
                f"1 and all are allowed, of {len(counts)} sections of {chain}{total}"
            )
        # Added up, not multiplied: that decides which way an exact half is rounded.
        stride = (len(section) - 1) / max(count - 1, 1)
        times += [*section[0] + np.cumsum([0.0] + [stride] * (count - 1)).round()]
    return np.array(times[::-1], np.int32)


def _even_in(measure: Float[np.ndarray, " t"], count: int) -> Int[np.ndarray, " count"]:
    """`count` >= 2 different times, as even in `measure` as whole times can be, from the last down.

    Where several would round to the same time, they take the next free ones toward the noise, and
    at that end toward the image.
    """
    even = np.linspace(measure[0], measure[-1], count)
    times = np.interp(even, measure, np.arange(len(measure))).round().astype(np.int32)
    room = np.arange(count, dtype=np.int32)
    times = np.maximum.accumulate(times - room) + room  # each at least one above the one before
    return np.minimum(times, len(measure) - count + room)[::-1]
