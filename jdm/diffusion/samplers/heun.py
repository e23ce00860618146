"""Karras et al. 2022, "Elucidating the design space of diffusion models", algorithm 1.

That algorithm leaves the scaling s(t) and the noise level sigma(t) open. Here s = cos(phi) and
sigma = tan(phi), under which x_t stays as a network knows it, phi runs over [0, pi/2] whatever the
schedule, and the slope is v = sqrt(abar) eps - sqrt(1 - abar) x_0. With h = phi_s - phi_t:

(8c)  x'  = x_t + h v(x_t, t)                              a guess, and then
      x_s = x_t + h [v(x_t, t) + v(x', s)] / 2             the trapezoid

Two evaluations a step, but one for the last.
"""

import jax.numpy as jnp

from jdm.diffusion.process import Diffusion
from jdm.diffusion.samplers.base import Sampler, angle, velocity


def heun(diffusion: Diffusion, eta: float) -> Sampler:
    """(8c), deterministic; eta is not used. What it remembers is (x, v) at the start of a step."""
    del eta

    def step(start, x, x0, estimate, visit, draw):
        del draw
        v = velocity(diffusion, x0, estimate.eps, visit.t)
        guess = x + (angle(visit.at_s) - angle(visit.at_t)) * v
        x_r, v_r = start
        corrected = x_r + (angle(visit.at_t) - angle(visit.at_r)) * (v_r + v) / 2
        memory = (jnp.where(visit.arriving, x_r, x), jnp.where(visit.arriving, v_r, v))
        return memory, jnp.where(visit.arriving, corrected, guess)

    return Sampler(step, init=lambda x: (jnp.zeros_like(x), jnp.zeros_like(x)), evaluations=2)
