"""Guidance: functions of a joint network in, an eps_fn(x, t) that leans toward a class out.

Owns how the classifier's gradient moves an image. Sees a network only as three functions, and a
sampler sees only the eps_fn that comes back, so any guidance goes with any sampler.

(13)  pixel            eps - s sqrt(1 - abar_t) g,  g = grad_x log p(y | x_t)
                                                                Dhariwal & Nichol 2021, alg. 2
(14)  representation   eps + s sqrt(1 - abar_t) |g| d / |d|,
                       d = sense · [decode(Z + p dZ) - decode(Z - p dZ)],
                       dZ = total derivative of log p(y | Z) with respect to every representation Z,
                       p such that |p dZ| = REACH |Z|           after Deja et al. 2023, section 4
(14b) published        decode(Z - a dZ), with one fixed a       Deja et al. 2023, as implemented

With (13) and (14) a positive scale moves the *image* toward the asked class. What a given a of
(14b) does depends on the network, on t and on how sure the classifier is: too little here is too
much there; it is kept for comparison. (14) takes from the representations only the direction of the
change, over a stretch that is measured by their own length, and from (13) how far to go, so that
one scale means the same for both, at every t and for every network. The stretch is long on purpose:
a network's answer to a large move says more about the class than its derivative does, and the
difference of two sides drops what both share.

Which side is toward the class depends on the network too, because the decoder gets x_t only through
Z. Moving Z up the classifier is like feeding the network x_t + d while x_t itself stays: a network
that predicts x_0 then estimates an image nearer to the class; one that predicts eps takes d for
noise to be removed, and estimates an image further from it. For v neither holds at every t. So the
sense is found for each image at each step: the estimate of x_0 must move along g.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdm.diffusion.process import Diffusion, Images, Times
from jdm.diffusion.samplers import EpsFn

Labels = Int[Array, " b"]
Scale = float | Float[Array, ""]

# How far (14) moves the representations, in their own length, to see where that leads.
REACH = 0.5
TINY = 1e-20  # against 0 / 0, where a classifier is so sure that its gradient is 0


class Network(NamedTuple):
    """A joint network as guidance sees it.

    encode: (x, t, nudges=None) -> features, a pytree of arrays [B, ...]. decode: (features, x, t)
    -> Estimate. classify: (features, t) -> logits [B, K].
    """

    encode: Callable
    decode: Callable
    classify: Callable


def _log_likelihood(logits: Float[Array, "b k"], labels: Labels) -> Float[Array, " b"]:
    """log p(y) of each row."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def _length(tree) -> Float[Array, " b"]:
    """Euclidean length of each row, over all arrays [B, ...] of a pytree."""
    squares = [
        (x.astype(jnp.float32) ** 2).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares))


def _rows(values: Float[Array, " b"], x: Array) -> Array:
    """One value per row, shaped and typed to multiply x [B, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def none(network: Network, diffusion: Diffusion, labels: Labels | None, scale: Scale) -> EpsFn:
    """The network's own estimate."""
    del diffusion, labels, scale

    def eps_fn(x: Images, t: Times):
        return network.decode(network.encode(x, t), x, t)

    return eps_fn


def pixel(network: Network, diffusion: Diffusion, labels: Labels, scale: Scale) -> EpsFn:
    """(13): the gradient of the classifier with respect to x_t. scale: s."""

    def eps_fn(x: Images, t: Times):
        def log_likelihood(x):
            features = network.encode(x, t)
            return _log_likelihood(network.classify(features, t), labels).sum(), features

        grad, features = jax.grad(log_likelihood, has_aux=True)(x)
        estimate = network.decode(features, x, t)
        _, b = diffusion.scales(t)
        return estimate._replace(eps=estimate.eps - scale * b * grad)

    return eps_fn


def gradients(network: Network, x: Images, t: Times, labels: Labels):
    """(g of (13) [B, H, W, C], dZ of (14), Z), the last two of the same shapes, at (x, t).

    dZ is the total derivative: a nudge of a representation goes through all later blocks.
    """

    def log_likelihood(x, nudges):
        features = network.encode(x, t, nudges)
        return _log_likelihood(network.classify(features, t), labels).sum(), features

    shapes = jax.eval_shape(network.encode, x, t)
    nudges = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
    (g, direction), features = jax.grad(log_likelihood, argnums=(0, 1), has_aux=True)(x, nudges)
    return g, direction, features


def representation(network: Network, diffusion: Diffusion, labels: Labels, scale: Scale) -> EpsFn:
    """(14), in the sense that moves the image toward the class. scale: s, as in (13)."""

    def eps_fn(x: Images, t: Times):
        g, direction, features = gradients(network, x, t, labels)
        p = REACH * _length(features) / jnp.maximum(_length(direction), TINY)

        def moved(p):
            there = jax.tree.map(lambda z, dz: z + _rows(p, z) * dz, features, direction)
            return network.decode(there, x, t).eps

        d = moved(p) - moved(-p)
        # x_0 = (x_t - b eps) / a: what adds to the estimate of x_0 takes from eps.
        sense = jnp.where(_rows((d * g).sum(axis=(1, 2, 3)), x) < 0, 1, -1)
        change = sense * d * _rows(_length(g) / jnp.maximum(_length(d), TINY), x)
        estimate = network.decode(features, x, t)
        _, b = diffusion.scales(t)
        return estimate._replace(eps=estimate.eps + scale * b * change)

    return eps_fn


def published(network: Network, diffusion: Diffusion, labels: Labels, scale: Scale) -> EpsFn:
    """(14b). scale: a; where it moves the image depends on what the network predicts.

    A learned variance is that of the moved representations, as published.
    """
    del diffusion

    def eps_fn(x: Images, t: Times):
        _, direction, features = gradients(network, x, t, labels)
        there = jax.tree.map(lambda z, dz: z - scale * dz, features, direction)
        return network.decode(there, x, t)

    return eps_fn


GUIDANCE: dict[str, Callable[..., EpsFn]] = {
    "none": none,
    "pixel": pixel,
    "representation": representation,
    "published": published,
}

# What digits, on their validation protocol, were happy with; other data may want others. The last
# is the published one.
DEFAULT_SCALES = {"none": 0.0, "pixel": 8.0, "representation": 8.0, "published": 1000.0}
