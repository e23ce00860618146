"""Lu et al. 2022, "DPM-Solver++", algorithm 2: the multistep solver of second order, "2M".

With lambda = log(sqrt(abar) / sqrt(1 - abar)), three consecutive times r, t, s, and
h = lambda_s - lambda_t, h_r = lambda_t - lambda_r:

(8b)  x_s = sqrt(1 - abar_s) / sqrt(1 - abar_t) x_t - sqrt(abar_s) (e^-h - 1) D,
      D = x_0(t) + (x_0(t) - x_0(r)) min(h / h_r, 1) / 2,     and D = x_0(t) in the first step

A step needs one evaluation, since it reuses the previous estimate. The minimum is not in the paper,
whose times are evenly spaced in lambda, so that h / h_r = 1. With times evenly spaced in t, the
last step is several times as long in lambda as the one before, and 20 steps without the minimum can
be less accurate than 20 of `ddim`. The order remains 2: as steps are added, h / h_r tends to 1.
"""

import jax.numpy as jnp

from jdm.diffusion.samplers.base import Sampler, Steps, half_log_snr


def dpmpp_2m(diffusion, method):
    def step(x0_r, x, x0, estimate, visit, draw):
        at_r, at_t, at_s = visit.at_r, visit.at_t, visit.at_s
        h = half_log_snr(at_s) - half_log_snr(at_t)
        h_r = half_log_snr(at_t) - half_log_snr(at_r)
        ratio = jnp.where(h_r > 0, h / jnp.where(h_r > 0, h_r, 1), 0)
        d = x0 + jnp.minimum(ratio, 1) / 2 * (x0 - x0_r)
        keep = jnp.sqrt(at_s.variance / at_t.variance)
        return x0, keep * x - jnp.sqrt(at_s.abar) * jnp.expm1(-h) * d

    return Steps(step, init=jnp.zeros_like)


SAMPLER = Sampler(dpmpp_2m, draws_noise=lambda method: False)
