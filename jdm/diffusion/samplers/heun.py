"""Karras et al. 2022, "Elucidating the design space of diffusion models", algorithm 1.

The algorithm holds for any scaling s(t) and noise scale sigma(t). Here s = cos(phi) and
sigma = tan(phi). Then x_t has the scale that the network was trained with, phi runs over [0, pi/2]
under every schedule, and dx / dphi = v = sqrt(abar) eps - sqrt(1 - abar) x_0. h = phi_s - phi_t:

(8c)  predictor:  x'  = x_t + h v(x_t, t)
      corrector:  x_s = x_t + h [v(x_t, t) + v(x', s)] / 2

N steps need 2 N - 1 evaluations: the last step, to the clean image, has no corrector.
"""

import jax.numpy as jnp

from jdm.diffusion.samplers.base import Sampler, Steps, angle, velocity


def heun(diffusion, method):
    def step(start, x, x0, estimate, visit, draw):
        v = velocity(diffusion, x0, estimate.eps, visit.t)
        predictor = x + (angle(visit.at_s) - angle(visit.at_t)) * v
        x_r, v_r = start  # at the start of the step that led to x
        corrector = x_r + (angle(visit.at_t) - angle(visit.at_r)) * (v_r + v) / 2
        memory = (jnp.where(visit.predicted, x_r, x), jnp.where(visit.predicted, v_r, v))
        return memory, jnp.where(visit.predicted, corrector, predictor)

    return Steps(step, init=lambda x: (jnp.zeros_like(x), jnp.zeros_like(x)))


SAMPLER = Sampler(heun, draws_noise=lambda method: False, evaluations=2)
