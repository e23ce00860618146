"""Samplers: from noise to images, given any eps_fn(x, t) -> Estimate.

Owns the order of steps and their noise. Does not know what an eps_fn does inside: a plain network,
one under guidance and an exact score all look alike. Each sampler is a file of its own, to be read
beside its paper; `reverse` drives it with a single lax.scan over times of the original chain, so a
network always sees the t it was trained with, however few the steps.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jdm.diffusion.process import Diffusion, Images, Level, pick
from jdm.diffusion.samplers.ancestral import ancestral
from jdm.diffusion.samplers.base import EpsFn, Sampler, Visit
from jdm.diffusion.samplers.ddim import ddim, ddim_inverse
from jdm.diffusion.samplers.dpmpp_2m import dpmpp_2m
from jdm.diffusion.samplers.heun import heun
from jdm.diffusion.samplers.times import SPACINGS, timesteps

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "THRESHOLDS",
    "EpsFn",
    "ddim_inverse",
    "image_noise",
    "reverse",
    "sample",
    "timesteps",
]

SAMPLERS: dict[str, Callable[[Diffusion, float], Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "heun": heun,
}

KEPT = 0.995  # of the pixels of an image are left as they are by "dynamic"


def _dynamic(x0: Images) -> Images:
    """Scales an image down by the magnitude that KEPT of its pixels stay below, where above 1."""
    most = jnp.quantile(jnp.abs(x0), KEPT, axis=(1, 2, 3), keepdims=True)
    most = jnp.maximum(most, 1)
    return jnp.clip(x0, -most, most) / most


# How an estimate of x_0 is held in [-1, 1].
THRESHOLDS: dict[str, Callable[[Images], Images]] = {
    "none": lambda x0: x0,
    "static": lambda x0: jnp.clip(x0, -1, 1),
    "dynamic": _dynamic,  # Saharia et al. 2022, section 2.3
}


def image_noise(keys: Key[Array, " b"], index, shape: tuple[int, ...]) -> Images:
    """Standard normal noise [B, *shape]: row i depends on its own key and the index alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def initial_noise(diffusion: Diffusion, keys: Key[Array, " b"], shape: tuple[int, ...]) -> Images:
    """x_T [B, *shape] of each key."""
    return image_noise(keys, diffusion.steps, shape)  # T: an index that no step uses


def sample(
    eps_fn: EpsFn,
    diffusion: Diffusion,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    *,
    sampler: str = "ddim",
    steps: int | str = 50,
    spacing: str = "uniform",
    eta: float = 0.0,
    threshold: str = "static",
) -> Images:
    """Images [B, *shape] (in [-1, 1] but for threshold "none"), one per key, noise to image.

    eps_fn: (xt [B, *shape], t int32 [B]) -> Estimate. steps, spacing: which of the diffusion's T
    times are visited, see `timesteps`. sampler, eta, threshold: see `reverse`.

    Raises ValueError for an unknown name and for steps that T does not hold.
    """
    times = timesteps(diffusion, steps, spacing)
    start = initial_noise(diffusion, keys, shape)
    options = dict(sampler=sampler, eta=eta, threshold=threshold)
    return reverse(eps_fn, diffusion, start, keys, times, **options)[0]


def reverse(
    eps_fn: EpsFn,
    diffusion: Diffusion,
    x: Images,
    keys: Key[Array, " b"],
    times: Int[np.ndarray, " steps"],
    *,
    sampler: str,
    eta: float = 0.0,
    threshold: str = "static",
    film: bool = False,
) -> tuple[Images, Float[Array, "steps b h w c"] | None]:
    """(x_0 [B, H, W, C], the estimates of it at each time [steps, B, H, W, C] or None).

    x: x_t at times[0]. keys: of the noise that is drawn on the way. times: from the noisiest down,
    see `timesteps`. sampler: one of SAMPLERS. eta: see `ddim`. threshold: one of THRESHOLDS; where
    it changes the estimate of x_0, eps is recomputed from it, so that the two stay consistent.
    film: whether the estimates are kept.

    Raises ValueError for an unknown name.
    """
    method = SAMPLERS[pick("sampler", sampler, SAMPLERS)](diffusion, eta)
    held = THRESHOLDS[pick("threshold", threshold, THRESHOLDS)]

    def body(carry, at):
        x, memory = carry
        time, at_r, at_t, at_s, arriving = at
        t = jnp.full(x.shape[:1], time)
        estimate = eps_fn(x, t)
        x0 = diffusion.x0_from_eps(x, t, estimate.eps)
        if threshold != "none":
            x0 = held(x0)
            estimate = estimate._replace(eps=diffusion.eps_from_x0(x, t, x0))
        draw = functools.partial(image_noise, keys, time, x.shape[1:])
        visit = Visit(t, at_r, at_t, at_s, arriving)
        memory, there = method.step(memory, x, x0, estimate, visit, draw)
        # From any x_t, the whole way to the clean image is the estimate of it.
        there = jnp.where((at_s.noise > 0) | arriving, there, x0)
        return (there, memory), x0 if film else None

    visits = _visits(diffusion, times, method.evaluations)
    (x, _), estimates = jax.lax.scan(body, (x, method.init(x)), visits)
    return x, estimates[~visits[-1]] if film else None


def _visits(diffusion: Diffusion, times: Int[np.ndarray, " steps"], evaluations: int):
    """The fields of Visit for each call of the eps_fn: every time once, or but the first twice."""
    r, t, s = np.array([times[0], *times[:-1]]), times, np.append(times[1:], -1)
    arriving = np.zeros(len(times), bool)
    if evaluations == 2:
        r, t, s = (x.repeat(2)[1:] for x in (r, t, s))
        arriving = np.arange(len(t)) % 2 == 1
    abar = np.append(diffusion.abar, 1.0)  # -1: the clean image
    return (t, *(Level.of(abar[x]) for x in (r, t, s)), arriving)
