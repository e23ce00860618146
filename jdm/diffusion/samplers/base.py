"""What all samplers share: the types of their steps, and measures of the noise level."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jdm.arrays import Images
from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, Estimate, Level

EpsFn = Callable[[Images, Int[Array, " b"]], Estimate]


class Visit(NamedTuple):
    """One evaluation of the eps_fn, at x_t. r is the timestep before t, and s the one after.

    t: int32 [B]. at_r, at_t, at_s: noise levels. At the first timestep, r is t; at the last one, s
    is the clean image (abar = 1). predicted: whether x is the output of a predictor, to be
    corrected; True only for samplers with two evaluations a step.
    """

    t: Int[Array, " b"]
    at_r: Level
    at_t: Level
    at_s: Level
    predicted: Bool[Array, ""]


class Steps(NamedTuple):
    """The steps of a sampler under one diffusion and method.

    step: (memory, x, x0, estimate, visit, draw) -> (memory, x_s). x0 and estimate are the estimates
    of x_0 and eps at (x, visit.t); draw() is standard normal noise, shaped like x. `reverse`
    replaces the x_s of the last step, to the clean image, by x0. init: x_T -> the first memory, a
    pytree that is passed from visit to visit.
    """

    step: Callable
    init: Callable[[Images], Any] = lambda x: ()


class Sampler(NamedTuple):
    """One entry of SAMPLERS.

    make: (diffusion, method) -> Steps. draws_noise: method -> whether it draws noise; if not, it is
    deterministic. evaluations: of the eps_fn in each step: 1, or 2 for predictor and corrector.
    takes: the options of Method that it uses and some other sampler does not.
    """

    make: Callable[[Diffusion, Method], Steps]
    draws_noise: Callable[[Method], bool]
    evaluations: int = 1
    takes: tuple[str, ...] = ()


def angle(level: Level) -> Float[Array, "..."]:
    """phi in [0, pi/2] such that x_t = cos(phi) x_0 + sin(phi) eps; 0 at the clean image."""
    return jnp.arctan2(jnp.sqrt(level.variance), jnp.sqrt(level.abar))


def half_log_snr(level: Level) -> Float[Array, "..."]:
    """lambda = log(sqrt(abar) / sqrt(1 - abar)); infinite at the clean image."""
    return 0.5 * (jnp.log(level.abar) - jnp.log(level.variance))


def velocity(diffusion: Diffusion, x0: Images, eps: Images, t: Int[Array, " b"]) -> Images:
    """v = dx / dphi along the deterministic path, sqrt(abar) eps - sqrt(1 - abar) x_0."""
    a, b = diffusion.scales(t)
    return a * eps - b * x0
