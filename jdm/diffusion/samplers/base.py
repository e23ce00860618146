"""What every sampler is made of: the function it sees, where it stands, and what it hands back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jdm.diffusion.process import Diffusion, Estimate, Images, Level

EpsFn = Callable[[Images, Int[Array, " b"]], Estimate]


class Visit(NamedTuple):
    """Where the eps_fn was just asked: at x_t, on the way from the noisier r to the cleaner s.

    t: int32 [B]. at_r, at_t, at_s: their levels; r is t itself at the first visit, s is the clean
    image (abar 1) at the last. arriving: whether x is a first guess at x_t, to be corrected before
    the way goes on (only samplers that ask twice a step have such visits).
    """

    t: Int[Array, " b"]
    at_r: Level
    at_t: Level
    at_s: Level
    arriving: Bool[Array, ""]


class Sampler(NamedTuple):
    """A way from x_t to x_s.

    init: x_T -> what the sampler remembers between visits, a pytree. step: (memory, x, x0,
    estimate, visit, draw) -> (memory, next x), where x0 and estimate.eps are the estimates at
    (x, visit.t) and draw() is new standard normal noise of the visit, shaped like x. The step to
    the clean image is not asked for: for all of them it is x0. evaluations: of the eps_fn in a
    step, 1 or 2.
    """

    step: Callable
    init: Callable[[Images], Any] = lambda x: ()
    evaluations: int = 1


def angle(level: Level) -> Float[Array, "..."]:
    """phi in [0, pi/2] with x_t = cos(phi) x_0 + sin(phi) eps; 0 is the clean image."""
    return jnp.arctan2(jnp.sqrt(level.noise), jnp.sqrt(level.abar))


def half_log_snr(level: Level) -> Float[Array, "..."]:
    """lambda = log(sqrt(abar) / sqrt(1 - abar)); infinite at the clean image."""
    return 0.5 * (jnp.log(level.abar) - jnp.log(level.noise))


def velocity(diffusion: Diffusion, x0: Images, eps: Images, t: Int[Array, " b"]) -> Images:
    """v = dx / dphi along the deterministic path, sqrt(abar) eps - sqrt(1 - abar) x_0."""
    a, b = diffusion.scales(t)
    return a * eps - b * x0
