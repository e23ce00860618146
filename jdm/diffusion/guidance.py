"""Guidance: functions of a joint network in, an eps_fn(x, t) that leans toward an answer out.

Owns how the classifier's gradient moves an image. Sees a network only as three functions, and a
sampler sees only the eps_fn that comes back, so any guidance goes with any sampler.

What is leaned toward is a row of weights q over the answers the classifier can give,

(13)  log p(target | x_t) = sum_k q_k log p(answer k | x_t):

a class, a distribution over classes, or any set of attributes on and off. A row of zeros is not
guided. With g = grad_x log p(target | x_t) and dZ = the total derivative of log p(target | Z) with
respect to every representation Z:

(14)  pixel            eps - s sqrt(1 - abar_t) g               Dhariwal & Nichol 2021, algorithm 2
(14a) representation   eps + s sqrt(1 - abar_t) |g| d / |d|,
                       d = ± [decode(Z') - decode(Z)], Z' = Z ± p dZ with |Z' - Z| = r |Z|
                                                                after Deja et al. 2023, section 4
(14b) both             the mean of the two
(14c) published        decode(Z - s dZ), with one fixed s       Deja et al. 2023, as implemented

With all but the last a positive scale moves the *image* toward the target. What a given s of (14c)
does depends on the network, on t and on how sure the classifier is: too little here is too much
there; it is kept for comparison. (14a) takes from the representations only the direction of the
change, over a stretch that is measured by their own length, and from (14) how far to go, so that
one scale means the same for all, at every t and for every network.

Which way along dZ is toward the target depends on the network, because the decoder gets x_t only
through Z. Moving Z up the classifier is like feeding the network x_t + u while x_t itself stays: a
network that predicts x_0 then estimates an image nearer to the class; one that predicts eps takes
u for noise to be removed, and estimates an image further from it. So Z moves up or down with the
prediction (REACH), and because for v neither holds at every t, the sign of d is found for each
image at each step: the estimate of x_0 must move along g.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdm.diffusion.process import Diffusion, Images, Times, pick
from jdm.diffusion.samplers import EpsFn

Targets = Float[Array, "b m"]
Scale = float | Float[Array, ""]
ScaleFn = Callable[[Times], Float[Array, "b 1 1 1"]]

TINY = 1e-20  # against 0 / 0: nothing is asked, or a classifier is so sure that its gradient is 0

# How far (14a) moves the representations, in their own length, to see where that leads: along dZ or
# against it, so that the image follows (see above). Where trained digits models predicted x0, any
# stretch gave what was asked for; where eps, a long one did more often, and where v, a short one.
REACH = {"eps": -1.0, "x0": 0.5, "v": -0.05, "previous": 0.5}


class Network(NamedTuple):
    """A joint network as guidance sees it.

    encode: (x, t, nudges=None) -> features, a pytree of arrays [B, ...]. decode: (features, x, t)
    -> Estimate. log_probabilities: (features, t) -> [B, M], of the M answers; see `answers`.
    """

    encode: Callable
    decode: Callable
    log_probabilities: Callable


def answers(logits: Float[Array, "b k"], multi_label: bool) -> Float[Array, "b m"]:
    """Log-probabilities of all answers: of the K classes, or of K times yes and then K times no."""
    if multi_label:
        return jax.nn.log_sigmoid(jnp.concatenate([logits, -logits], axis=1))
    return jax.nn.log_softmax(logits)


class Options(NamedTuple):
    """How representations are moved.

    blocks: which, a pytree of bool like the features; None is all. inner_steps: in how many steps,
    each along the derivative where the last one ended.
    """

    blocks: Any = None
    inner_steps: int = 1


def _log_likelihood(network: Network, features, t: Times, targets: Targets) -> Float[Array, ""]:
    """(13), summed over the rows: a row's gradient is its own."""
    return (targets * network.log_probabilities(features, t)).sum()


def _length(tree) -> Float[Array, " b"]:
    """Euclidean length of each row, over all arrays [B, ...] of a pytree."""
    squares = [
        (x.astype(jnp.float32) ** 2).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares))


def _rows(values: Float[Array, " b"], x: Array) -> Array:
    """One value per row, shaped and typed to multiply x [B, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def none(network: Network, diffusion: Diffusion, targets, scale_fn, options) -> EpsFn:
    """The network's own estimate."""
    del diffusion, targets, scale_fn, options

    def eps_fn(x: Images, t: Times):
        return network.decode(network.encode(x, t), x, t)

    return eps_fn


def pixel(
    network: Network, diffusion: Diffusion, targets: Targets, scale_fn: ScaleFn, options: Options
) -> EpsFn:
    """(14): the gradient of the classifier with respect to x_t."""
    del options

    def eps_fn(x: Images, t: Times):
        def log_likelihood(x):
            features = network.encode(x, t)
            return _log_likelihood(network, features, t, targets), features

        g, features = jax.grad(log_likelihood, has_aux=True)(x)
        estimate = network.decode(features, x, t)
        _, b = diffusion.scales(t)
        return estimate._replace(eps=estimate.eps - scale_fn(t) * b * g)

    return eps_fn


def gradients(network: Network, x: Images, t: Times, targets: Targets):
    """(g [B, H, W, C], dZ, Z), the last two like the features, at (x, t).

    dZ is the total derivative: a nudge of a representation goes through all later blocks.
    """

    def log_likelihood(x, nudges):
        features = network.encode(x, t, nudges)
        return _log_likelihood(network, features, t, targets), features

    shapes = jax.eval_shape(network.encode, x, t)
    nudges = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
    (g, direction), features = jax.grad(log_likelihood, argnums=(0, 1), has_aux=True)(x, nudges)
    return g, direction, features


def _chosen(features, blocks):
    """The features, or their derivatives, but 0 for those that are not to move."""
    if blocks is None:
        return features
    return jax.tree.map(lambda z, moves: z if moves else jnp.zeros_like(z), features, blocks)


def _moved(network, x, t, targets, direction, features, reach: float, options: Options):
    """Z' of (14a): each inner step goes an equal part of the stretch along its own derivative."""
    part = reach / options.inner_steps * _length(_chosen(features, options.blocks))

    def step(nudges, direction):
        direction = _chosen(direction, options.blocks)
        p = part / jnp.maximum(_length(direction), TINY)
        return jax.tree.map(lambda n, dz: n + _rows(p, dz) * dz, nudges, direction)

    def again(_, nudges):
        def log_likelihood(nudges):
            return _log_likelihood(network, network.encode(x, t, nudges), t, targets)

        return step(nudges, jax.grad(log_likelihood)(nudges))

    nudges = step(jax.tree.map(jnp.zeros_like, features), direction)
    if options.inner_steps > 1:
        nudges = jax.lax.fori_loop(1, options.inner_steps, again, nudges)
    # All of them move at once: the encoder does not run again with the nudges in place.
    return jax.tree.map(jnp.add, features, nudges)


def _with_representations(pixel_share: float) -> Callable[..., EpsFn]:
    """(14a), or with a share of (14) in it: (14b)."""

    def guidance(
        network: Network,
        diffusion: Diffusion,
        targets: Targets,
        scale_fn: ScaleFn,
        options: Options,
    ) -> EpsFn:
        reach = REACH[diffusion.prediction]

        def eps_fn(x: Images, t: Times):
            g, direction, features = gradients(network, x, t, targets)
            there = _moved(network, x, t, targets, direction, features, reach, options)
            estimate = network.decode(features, x, t)
            d = network.decode(there, x, t).eps - estimate.eps
            # x_0 = (x_t - b eps) / a: what adds to the estimate of x_0 takes from eps.
            sign = jnp.where(_rows((d * g).sum(axis=(1, 2, 3)), x) < 0, 1, -1)
            change = sign * d * _rows(_length(g) / jnp.maximum(_length(d), TINY), x)
            change = (1 - pixel_share) * change - pixel_share * g
            _, b = diffusion.scales(t)
            return estimate._replace(eps=estimate.eps + scale_fn(t) * b * change)

        return eps_fn

    return guidance


def published(
    network: Network, diffusion: Diffusion, targets: Targets, scale_fn: ScaleFn, options: Options
) -> EpsFn:
    """(14c); where it moves the image depends on what the network predicts.

    A learned variance is that of the moved representations, as published.
    """
    del diffusion

    def eps_fn(x: Images, t: Times):
        _, direction, features = gradients(network, x, t, targets)
        direction, s = _chosen(direction, options.blocks), scale_fn(t)[:, 0, 0, 0]
        there = jax.tree.map(lambda z, dz: z - _rows(s, z) * dz, features, direction)
        return network.decode(there, x, t)

    return eps_fn


GUIDANCE: dict[str, Callable[..., EpsFn]] = {
    "none": none,
    "pixel": pixel,
    "representation": _with_representations(pixel_share=0.0),
    "both": _with_representations(pixel_share=0.5),
    "published": published,
}

# Those that move representations, and so know blocks; of these, those that can in several steps.
WITH_BLOCKS = ("representation", "both", "published")
WITH_INNER_STEPS = ("representation", "both")

# What digits, on their validation protocol, were happy with; other data may want others. The last
# is the published one.
DEFAULT_SCALES = {
    "none": 0.0,
    "pixel": 8.0,
    "representation": 8.0,
    "both": 8.0,
    "published": 1000.0,
}

# How the scale changes on the way from noise, u = 1, to the image, u = 0; 1 in the mean.
SCALE_SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "early": lambda u: 2 * u,
    "late": lambda u: 2 * (1 - u),
    "middle": lambda u: 2 * jnp.sin(np.pi * u) ** 2,
}


def guide(
    network: Network,
    diffusion: Diffusion,
    guidance: str,
    targets: Targets | None,
    scale: Scale,
    *,
    schedule: str = "constant",
    blocks: Any = None,
    inner_steps: int = 1,
) -> EpsFn:
    """The network's eps_fn under guidance.

    guidance: one of GUIDANCE. targets: q of (13), float [B, M]; None with "none". scale: s;
    schedule: one of SCALE_SCHEDULES, what s is multiplied by at t, with u = t / (T - 1). blocks,
    inner_steps: see `Options`.

    Raises ValueError for an unknown name.
    """
    factor = SCALE_SCHEDULES[pick("scale_schedule", schedule, SCALE_SCHEDULES)]

    def scale_fn(t):
        u = t.astype(jnp.float32) / max(diffusion.steps - 1, 1)
        return scale * factor(u)[:, None, None, None]

    make = GUIDANCE[pick("guidance", guidance, GUIDANCE)]
    return make(network, diffusion, targets, scale_fn, Options(blocks, inner_steps))


def block_mask(names: Any, chosen: Sequence[str] | None) -> Any:
    """Options.blocks of the named blocks. names: a pytree of str, like the features.

    Raises ValueError for a name that no block has, and where none is named.
    """
    if chosen is None:
        return None
    known = jax.tree.leaves(names)
    for name in chosen:
        pick("blocks", name, known)
    if not chosen:
        raise ValueError(f"blocks is empty; known: {', '.join(known)}")
    return jax.tree.map(lambda name: name in chosen, names)
