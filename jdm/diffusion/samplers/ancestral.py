"""Ho, Jain & Abbeel 2020, "Denoising diffusion probabilistic models", algorithm 2.

(7)  x_s ~ N(mean of q(x_s | x_t, estimated x_0), variance)

The variance is the fixed one of the diffusion, or the learned one of the estimate. The deviation of
the noise is multiplied by s_noise, after the S_noise of Karras et al. 2022, algorithm 2.
"""

import jax.numpy as jnp

from jdm.diffusion.samplers.base import Sampler, Steps


def ancestral(diffusion, method):
    def step(memory, x, x0, estimate, visit, draw):
        mean = diffusion.posterior_mean(x0, x, visit.at_t, visit.at_s)
        log_variance = diffusion.log_variance(estimate, visit.t, visit.at_t, visit.at_s)
        return memory, mean + method.s_noise * jnp.exp(0.5 * log_variance) * draw()

    return Steps(step)


SAMPLER = Sampler(ancestral, draws_noise=lambda method: True, takes=("s_noise",))
