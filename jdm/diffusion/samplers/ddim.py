"""Song, Meng & Ermon 2021, "Denoising diffusion implicit models", equations 12 and 16.

(8)  x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma²) eps + sigma z,
     sigma = eta sqrt(variance of q(x_s | x_t, x_0))

With eta = 1, sigma² is that variance. With eta = 0, it is a first-order solver of the
probability-flow ODE, and can be run backwards, from an image to its x_T (`ddim_inverse`). With
x_t = cos(phi) x_0 + sin(phi) eps, v = dx / dphi and h = phi_t - phi_s, a step is the rotation
x_s = cos(h) x_t - sin(h) v(x_t, t). Solved for x_t, it is a fixed-point equation:

(8a)  x_t = [x_s + sin(h) v(x_t, t)] / cos(h)

The iteration starts from the x_t that is computed with the v of the previous step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jdm.arrays import Images
from jdm.diffusion.process import Diffusion, Level
from jdm.diffusion.samplers.base import EpsFn, Sampler, Steps, angle, velocity
from jdm.diffusion.samplers.times import AnyTimesteps


def ddim(diffusion, method):
    def step(memory, x, x0, estimate, visit, draw):
        at_s = visit.at_s
        sigma = method.eta * jnp.sqrt(diffusion.step_variance(visit.at_t, at_s))
        b = jnp.sqrt(jnp.maximum(at_s.variance - sigma**2, 0))
        x = jnp.sqrt(at_s.abar) * x0 + b * estimate.eps
        return memory, x + sigma * draw() if method.eta > 0 else x

    return Steps(step)


SAMPLER = Sampler(ddim, draws_noise=lambda method: method.eta > 0, takes=("eta",))


def ddim_inverse(
    eps_fn: EpsFn, diffusion: Diffusion, x0: Images, times: AnyTimesteps, iterations: int = 5
) -> Images:
    """The x_T [B, H, W, C] from which `ddim`, with eta = 0 and the same times, returns to x0.

    iterations: of (8a) in each step, with one evaluation of the eps_fn each. Estimates of x_0 are
    not thresholded here; sampling returns to x0 only if it does not threshold them either.
    """
    upward = jnp.asarray(times)[::-1]
    angles = angle(Level.of(np.append(diffusion.abar, 1.0)))  # the last one, -1, is the clean image
    h = angles[upward] - angles[jnp.append(-1, upward[:-1])]

    def v_at(x, time):
        t = jnp.full(x.shape[:1], time)
        estimate = eps_fn(x, t)
        return velocity(diffusion, diffusion.x0_of(estimate, x, t), estimate.eps, t)

    def step(carry, inputs):
        (x, v), (time, h) = carry, inputs
        first = jnp.cos(h) * x + jnp.sin(h) * v

        def iterate(_, pair):
            v = v_at(pair[0], time)
            return (x + jnp.sin(h) * v) / jnp.cos(h), v

        return jax.lax.fori_loop(0, iterations, iterate, (first, v)), None

    start = x0, v_at(x0, upward[0])
    return jax.lax.scan(step, start, (upward, h))[0][0]
