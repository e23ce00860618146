"""Samplers: from noise to images, given any eps_fn(x, t) -> Estimate.

Owns the order of steps and their noise. Does not know what an eps_fn does inside: a plain network,
one under guidance and an exact score all look alike. A sampler is a `step`; `sample` drives
it with a single lax.scan over timesteps of the original chain, so a network always sees the t
it was trained with, however few the steps.

(7)  ancestral   x_s ~ N(posterior mean of the estimated x_0, variance)   Ho et al. 2020, alg. 2
(8)  ddim        x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma²) eps + sigma z,
                 sigma = eta sqrt(variance of (2))                        Song et al. 2021, eq. 12
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jdm.diffusion.process import Diffusion, Estimate, Images, Level, pick

EpsFn = Callable[[Images, Int[Array, " b"]], Estimate]


class Position(NamedTuple):
    """Where a step goes: from t, at its level, to a less noisy one (abar 1 is the clean image)."""

    t: Int[Array, " b"]
    at_t: Level
    at_s: Level


def ancestral(diffusion: Diffusion, eta: float) -> Callable:
    """(7): a draw from the reverse posterior; the last step takes its mean. eta is not used."""
    del eta

    def step(x, x0, estimate, position, draw):
        mean = diffusion.posterior_mean(x0, x, position.at_t, position.at_s)
        deviation = jnp.exp(0.5 * diffusion.log_variance(estimate, *position))
        return jnp.where(position.at_s.noise > 0, mean + deviation * draw(), mean)

    return step


def ddim(diffusion: Diffusion, eta: float) -> Callable:
    """(8): deterministic at eta = 0, as noisy as the posterior at eta = 1."""

    def step(x, x0, estimate, position, draw):
        _, at_t, at_s = position
        sigma = eta * jnp.sqrt(diffusion.step_variance(at_t, at_s))
        direction = jnp.sqrt(jnp.maximum(at_s.noise - sigma**2, 0)) * estimate.eps
        x = jnp.sqrt(at_s.abar) * x0 + direction
        return x + sigma * draw() if eta else x

    return step


SAMPLERS: dict[str, Callable] = {"ancestral": ancestral, "ddim": ddim}


def timesteps(total: int, steps: int | str) -> Int[np.ndarray, " steps"]:
    """The times that are visited, from the noisiest down, of a chain of `total`.

    steps: how many, evenly spaced from total - 1 to 0; or how many of each section, such as
    "10,10,20": the chain is cut into sections as long as each other, the least noisy first, and
    each is visited evenly from its first time to its last (a section of one at its first). The
    rounding is that of the published code, to the same times. Only a single step differs: it
    starts at the noise, total - 1, where the published one starts at 0.

    Raises ValueError for a count below 1 or above the length of its section.
    """
    try:
        counts = [int(count) for count in str(steps).split(",")]
    except ValueError:
        raise ValueError(
            f"steps={steps} must be a whole number, or section counts such as 10,10,20"
        ) from None
    if len(counts) == 1 and not 1 <= counts[0] <= total:
        raise ValueError(f"steps={steps} must lie between 1 and diffusion.steps={total}")
    if counts == [1]:
        return np.array([total - 1], np.int32)
    times = []
    for section, count in zip(np.array_split(np.arange(total), len(counts)), counts, strict=True):
        if not 1 <= count <= len(section):
            raise ValueError(
                f"steps={steps} asks for {count} of the {len(section)} times of a section; between "
                f"1 and all are allowed, of {len(counts)} sections of diffusion.steps={total}"
            )
        # Added up, not multiplied: that decides which way an exact half is rounded.
        stride = (len(section) - 1) / max(count - 1, 1)
        times += [*section[0] + np.cumsum([0.0] + [stride] * (count - 1)).round()]
    return np.array(times[::-1], np.int32)


def image_noise(keys: Key[Array, " b"], index, shape: tuple[int, ...]) -> Images:
    """Standard normal noise [B, *shape]: row i depends on its own key and the index alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def sample(
    eps_fn: EpsFn,
    diffusion: Diffusion,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    *,
    sampler: str = "ddim",
    steps: int | str = 50,
    eta: float = 0.0,
    clip: bool = True,
) -> Images:
    """Images [B, *shape] (in [-1, 1] where clip is on), one per key, noise to image.

    eps_fn: (xt [B, *shape], t int32 [B]) -> Estimate. steps: which of the diffusion's T times
    are visited, see `timesteps`. eta: see `ddim`. clip: hold the estimate of x0 in [-1, 1]; eps is
    then recomputed from it, so that the two stay consistent.

    Raises ValueError for an unknown sampler and for steps that T does not hold.
    """
    step = SAMPLERS[pick("sampler", sampler, SAMPLERS)](diffusion, eta)
    times = timesteps(diffusion.steps, steps)
    abar = np.append(diffusion.abar[times], 1.0)
    xs = (times, Level.of(abar[:-1]), Level.of(abar[1:]))

    def body(x, at):
        time, at_t, at_s = at
        t = jnp.full(x.shape[:1], time)
        estimate = eps_fn(x, t)
        x0 = diffusion.x0_from_eps(x, t, estimate.eps)
        if clip:
            x0 = jnp.clip(x0, -1, 1)
            estimate = estimate._replace(eps=diffusion.eps_from_x0(x, t, x0))
        draw = functools.partial(image_noise, keys, time, shape)
        return step(x, x0, estimate, Position(t, at_t, at_s), draw), None

    start = image_noise(keys, diffusion.steps, shape)  # T: an index that no step uses
    return jax.lax.scan(body, start, xs)[0]
