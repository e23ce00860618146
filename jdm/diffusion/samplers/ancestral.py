"""The chain of Ho, Jain & Abbeel 2020, "Denoising diffusion probabilistic models", algorithm 2.

(7)  x_s ~ N(mean of q(x_s | x_t, estimated x_0), variance)

The variance is the one that Diffusion fixes, or the network's own where it learns one.
"""

import jax.numpy as jnp

from jdm.diffusion.process import Diffusion
from jdm.diffusion.samplers.base import Sampler


def ancestral(diffusion: Diffusion, eta: float) -> Sampler:
    """(7); eta is not used."""
    del eta

    def step(memory, x, x0, estimate, visit, draw):
        mean = diffusion.posterior_mean(x0, x, visit.at_t, visit.at_s)
        log_variance = diffusion.log_variance(estimate, visit.t, visit.at_t, visit.at_s)
        return memory, mean + jnp.exp(0.5 * log_variance) * draw()

    return Sampler(step)
