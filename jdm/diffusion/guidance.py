"""Guidance: functions of a joint network in, an eps_fn(x, t) that leans toward a class out.

Owns how the classifier's gradient moves an image. Sees a network only as three functions, and a
sampler sees only the eps_fn that comes back, so any guidance goes with any sampler.

In each of them a positive scale moves the *image* toward the asked class.

(13)  pixel            eps - s sqrt(1 - abar_t) grad_x log p(y | x_t)
                                                                Dhariwal & Nichol 2021, alg. 2
(14)  representation   decode(Z + a dZ), dZ = total derivative of log p(y | Z) with respect to
                       every representation Z                   Deja et al. 2023, section 4

What (14) does to the image depends on the network, because the decoder gets x_t only through Z.
Moving Z up the classifier is like feeding the network x_t + d while x_t itself stays: a network
that predicts x_0 then estimates an image nearer to the class; one that predicts eps takes d for
noise to be removed, and estimates an image further from it. For v neither holds at every t. So the
sense is found for each image at each step: of the two moves a = +s and a = -s, the one whose
estimate of x_0 lies further along grad_x log p(y | x_t) is the one toward the class.
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


def _inner(a: Images, b: Images) -> Float[Array, "b 1 1 1"]:
    """Inner product of each pair of images."""
    return (a * b).sum(axis=(1, 2, 3), keepdims=True)


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


def representation(network: Network, diffusion: Diffusion, labels: Labels, scale: Scale) -> EpsFn:
    """(14), in the sense that moves the image toward the class. scale: a."""

    def eps_fn(x: Images, t: Times):
        def log_likelihood(x, nudges):
            features = network.encode(x, t, nudges)
            return _log_likelihood(network.classify(features, t), labels).sum(), features

        shapes = jax.eval_shape(network.encode, x, t)
        nudges = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
        grads, features = jax.grad(log_likelihood, argnums=(0, 1), has_aux=True)(x, nudges)
        toward, direction = grads

        def moved(amount):
            features_moved = jax.tree.map(lambda z, dz: z + amount * dz, features, direction)
            return network.decode(features_moved, x, t).eps

        up, down = moved(scale), moved(-scale)
        # x_0 = (x_t - b eps) / a: what adds to the estimate of x_0 takes from eps.
        sense = _inner(down - up, toward) * scale > 0
        # The variance stays the network's own; where none is learned, this decode is compiled away.
        estimate = network.decode(features, x, t)
        return estimate._replace(eps=jnp.where(sense, up, down))

    return eps_fn


GUIDANCE: dict[str, Callable[..., EpsFn]] = {
    "none": none,
    "pixel": pixel,
    "representation": representation,
}

# What digits, on their validation protocol, were happy with; other data may want others.
DEFAULT_SCALES = {"none": 0.0, "pixel": 8.0, "representation": 300.0}
