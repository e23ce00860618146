"""Song, Meng & Ermon 2021, "Denoising diffusion implicit models", equations 12 and 16; and back.

(8)  x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma²) eps + sigma z,
     sigma = eta sqrt(variance of q(x_s | x_t, x_0))

With eta = 0 it is a first-order solver of the probability-flow ODE and can be run backwards, from
an image to the noise that makes it. With x_t = cos(phi) x_0 + sin(phi) eps, v = dx / dphi and
h = phi_t - phi_s, its step is a rotation, x_s = cos(h) x_t - sin(h) v(x_t, t), so that

(8a)  x_t = [x_s + sin(h) v(x_t, t)] / cos(h),

which is solved by putting a guess of x_t into the right side, again and again; the first guess
takes v of the step before.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jdm.diffusion.process import Diffusion, Images, Level
from jdm.diffusion.samplers.base import EpsFn, Sampler, angle, velocity


def ddim(diffusion: Diffusion, eta: float) -> Sampler:
    """(8): deterministic at eta = 0, as noisy as the posterior at eta = 1."""

    def step(memory, x, x0, estimate, visit, draw):
        at_s = visit.at_s
        sigma = eta * jnp.sqrt(diffusion.step_variance(visit.at_t, at_s))
        direction = jnp.sqrt(jnp.maximum(at_s.noise - sigma**2, 0)) * estimate.eps
        x = jnp.sqrt(at_s.abar) * x0 + direction
        return memory, x + sigma * draw() if eta else x

    return Sampler(step)


def ddim_inverse(
    eps_fn: EpsFn,
    diffusion: Diffusion,
    x0: Images,
    times: Int[np.ndarray, " steps"],
    iterations: int = 5,
) -> Images:
    """x_T [B, H, W, C] from which `ddim` at eta = 0, over the same times, comes back to x0.

    times: from the noisiest down, as `timesteps` gives them. iterations: of (8a), each one call of
    the eps_fn a step. Estimates are never thresholded here; coming back they must not be either.
    """
    upward = times[::-1]
    abar = np.append(1.0, diffusion.abar[upward])
    turn = angle(Level.of(abar[1:])) - angle(Level.of(abar[:-1]))

    def v_at(x, time):
        t = jnp.full(x.shape[:1], time)
        eps = eps_fn(x, t).eps
        return velocity(diffusion, diffusion.x0_from_eps(x, t, eps), eps, t)

    def body(carry, at):
        (x, v), (time, h) = carry, at
        guess = jnp.cos(h) * x + jnp.sin(h) * v

        def refine(_, pair):
            v = v_at(pair[0], time)
            return (x + jnp.sin(h) * v) / jnp.cos(h), v

        return jax.lax.fori_loop(0, iterations, refine, (guess, v)), None

    start = (x0, v_at(x0, jnp.int32(upward[0])))
    return jax.lax.scan(body, start, (upward, turn))[0][0]
