"""The layers that networks consist of: dense layer, convolution, normalisations.

They have the same parameters as Flax's layers of these names, with the same initial values. Flax's
own trace the initialiser of each parameter whenever a network is applied, to compare shapes. That
is a large part of the time that tracing a forward pass takes.
"""

import functools
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdm.nn.convolution import conv

ZEROS, ONES = nn.initializers.zeros, nn.initializers.ones
# Jitted with the shape and the dtype as static arguments, so that equal shapes are traced once.
LECUN_NORMAL = jax.jit(nn.initializers.lecun_normal(), static_argnums=(1, 2))


class Layer(nn.Module):
    """A module with parameters in float32."""

    def weight(self, name: str, init: Callable, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """The parameter of this name. Raises AssertionError if it has another shape."""
        if not self.has_variable("params", name):
            return self.param(name, init, shape, jnp.float32)
        weight = jnp.asarray(self.get_variable("params", name))
        chex.assert_shape(weight, shape)
        return weight


class Dense(Layer):
    """Linear layer on the last axis: [..., C] -> [..., features], computed in dtype."""

    features: int
    dtype: jnp.dtype = jnp.dtype("float32")
    kernel_init: Callable = LECUN_NORMAL

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.weight("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.weight("bias", ZEROS, (self.features,))
        over_channels = (((x.ndim - 1,), (0,)), ((), ()))
        x = jax.lax.dot_general(x.astype(self.dtype), kernel.astype(self.dtype), over_channels)
        return x + bias.astype(self.dtype)


class Conv(Layer):
    """Convolution of images [B, H, W, C], computed in dtype.

    size: of the kernel, an odd number. The image is padded by (size - 1) / 2 on every side, at any
    stride.
    """

    features: int
    size: int
    dtype: jnp.dtype
    stride: int = 1
    kernel_init: Callable = LECUN_NORMAL

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.weight("kernel", self.kernel_init, shape)
        bias = self.weight("bias", ZEROS, (self.features,))
        x = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        return x + bias.astype(self.dtype)


class GroupNorm(Layer):
    """Normalises groups of channels of each image to mean 0 and variance 1 (Wu & He 2018).

    Input [B, H, W, C] of any float dtype; output float32. epsilon is added to the variance.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.weight("scale", ONES, x.shape[-1:])
        bias = self.weight("bias", ZEROS, x.shape[-1:])
        return group_norm(x.astype(jnp.float32), scale, bias, self.groups, self.epsilon)


@functools.partial(jax.jit, static_argnums=(3, 4))  # so that equal shapes are traced once
def group_norm(x, scale, bias, groups, epsilon):
    """See `GroupNorm`. Sums are over positions first, and then over the channels of a group."""
    b, height, width, channels = x.shape

    def mean(z):  # [B, H, W, C] -> [B, groups, 1]
        of_channels = z.sum(axis=(1, 2)).reshape(b, groups, -1)
        return of_channels.mean(axis=-1, keepdims=True) / (height * width)

    mu = mean(x)
    variance = jnp.maximum(mean(x * x) - mu * mu, 0)
    factor = jax.lax.rsqrt(variance + epsilon) * scale.reshape(groups, -1)
    offset = bias.reshape(groups, -1) - mu * factor
    return x * factor.reshape(b, 1, 1, channels) + offset.reshape(b, 1, 1, channels)


class LayerNorm(Layer):
    """Normalises each row of [B, C] to mean 0 and variance 1 (Ba, Kiros & Hinton 2016)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c"]:
        scale = self.weight("scale", ONES, x.shape[-1:])
        bias = self.weight("bias", ZEROS, x.shape[-1:])
        mu = x.mean(axis=-1, keepdims=True)
        variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mu * mu, 0)
        return (x - mu) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias
