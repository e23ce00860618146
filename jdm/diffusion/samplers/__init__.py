"""Samplers: from noise to images, with any eps_fn(x, t) -> Estimate.

The eps_fn may be a network, a network under guidance, or an exact score. Each sampler is one file,
written to be read beside its paper. `reverse` runs a sampler as one lax.scan over timesteps of the
original diffusion, so that the network sees only values of t that it was trained with.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jdm import names
from jdm.arrays import Images, Times
from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, Level
from jdm.diffusion.samplers.base import EpsFn, Sampler, Visit
from jdm.diffusion.samplers.ddim import ddim_inverse as ddim_inverse
from jdm.diffusion.samplers.times import SPACINGS as SPACINGS
from jdm.diffusion.samplers.times import AnyTimesteps
from jdm.diffusion.samplers.times import timesteps as timesteps

SAMPLERS: dict[str, Sampler] = names.SAMPLERS.modules(__name__, "SAMPLER")


def _dynamic(x0: Images) -> Images:
    """Divides each image by the 99.5th percentile of |x_0|, or by 1 if that is larger, and clips it
    to [-1, 1]. Saharia et al. 2022, section 2.3."""
    limit = jnp.maximum(jnp.quantile(jnp.abs(x0), 0.995, axis=(1, 2, 3), keepdims=True), 1)
    return jnp.clip(x0 / limit, -1, 1)  # in this order, since XLA may divide as x0 * (1 / limit)


# How an estimate of x_0 is brought into [-1, 1]; None leaves it unchanged.
THRESHOLDS: dict[str, Callable[[Images], Images] | None] = names.THRESHOLDS.records(
    none=None, static=lambda x0: jnp.clip(x0, -1, 1), dynamic=_dynamic
)


def image_noise(keys: Key[Array, " b"], index, shape: tuple[int, ...]) -> Images:
    """Standard normal noise [B, *shape]; row i depends only on keys[i] and the index."""

    def of_image(key):
        return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

    return jax.vmap(of_image)(keys)


def initial_noise(diffusion: Diffusion, keys: Key[Array, " b"], shape: tuple[int, ...]) -> Images:
    """x_T [B, *shape], one image for each key."""
    return image_noise(keys, diffusion.steps, shape)  # the steps use the indices below T


def reverse(
    eps_fn: EpsFn,
    diffusion: Diffusion,
    x: Images,
    keys: Key[Array, " b"],
    times: AnyTimesteps,
    method: Method,
    trajectory: bool = False,
    replace: Callable[[Images, Times, Images, Level], Images] | None = None,
) -> tuple[Images, Float[Array, "steps b h w c"] | None]:
    """Samples x_0 [B, H, W, C] from x, the x_t at times[0]; returns (x_0, trajectory or None).

    keys: one for each image, for the noise that the sampler draws. times: decreasing, see
    `timesteps`; may be traced, so that one compiled program serves as many timesteps of any values.
    method: its sampler, eta and threshold are used; where the threshold changes an estimate of x_0,
    eps is recomputed from it. trajectory: whether to return the estimates of x_0 at each timestep,
    [steps, B, H, W, C]. replace: called after each step with (x_t, t, x_s, level of s); returns the
    x_s to go on from.

    Raises AssertionError where eps_fn returns another shape than that of x.
    """
    init, visit = visitor(eps_fn, diffusion, x, keys, method)

    def body(carry, inputs):
        (x_s, memory), x0 = visit(carry, inputs)
        if replace is not None:
            t, _, _, at_s, _ = inputs
            x_s = replace(carry[0], jnp.full(x.shape[:1], t), x_s, at_s)
        return (x_s, memory), x0 if trajectory else None

    schedule = visits(diffusion, times, SAMPLERS[method.sampler].evaluations)
    (x, _), estimates = jax.lax.scan(body, init, schedule)
    if not trajectory:
        return x, None
    estimates = estimates[~schedule[-1]]
    return estimates[-1], estimates  # x but for rounding: XLA may compute the two separately


def visitor(
    eps_fn: EpsFn, diffusion: Diffusion, x: Images, keys: Key[Array, " b"], method: Method
) -> tuple[Any, Callable[[Any, Any], tuple[Any, Images]]]:
    """(the first carry, visit): the steps of `reverse`, one at a time.

    x, keys, method: see `reverse`. A carry is (x_t, the sampler's memory). visit: (carry, one entry
    of each array of `visits`) -> (carry, the estimate of x_0 at x_t).
    """
    steps, threshold = (
        SAMPLERS[method.sampler].make(diffusion, method),
        THRESHOLDS[method.threshold],
    )

    def visit(carry, inputs):
        x, memory = carry
        time, at_r, at_t, at_s, predicted = inputs
        t = jnp.full(x.shape[:1], time)
        estimate = eps_fn(x, t)
        chex.assert_equal_shape((x, estimate.eps))  # another shape would be broadcast
        x0 = diffusion.x0_of(estimate, x, t)
        if threshold is not None:
            x0 = threshold(x0)
            estimate = estimate._replace(eps=diffusion.eps_from_x0(x, t, x0))
        draw = functools.partial(image_noise, keys, time, x.shape[1:])
        seen = Visit(t, at_r, at_t, at_s, predicted)
        memory, x_s = steps.step(memory, x, x0, estimate, seen, draw)
        # For every sampler, the step to the clean image returns the estimate of x_0.
        return (jnp.where((at_s.variance > 0) | predicted, x_s, x0), memory), x0

    return (x, steps.init(x)), visit


def visits(diffusion: Diffusion, times: AnyTimesteps, evaluations: int) -> tuple:
    """The fields of every Visit in order, as arrays. With two evaluations a step, all timesteps but
    the first are visited twice: at the predictor's x, then at the corrected x."""
    times = jnp.asarray(times)
    r, t, s = jnp.append(times[0], times[:-1]), times, jnp.append(times[1:], -1)
    predicted = np.zeros(len(times), bool)
    if evaluations == 2:
        r, t, s = (x.repeat(2)[1:] for x in (r, t, s))
        predicted = np.arange(len(t)) % 2 == 1
    levels = Level.of(np.append(diffusion.abar, 1.0))  # the last one, -1, is the clean image
    return (t, *(Level(levels.abar[x], levels.variance[x]) for x in (r, t, s)), predicted)
