"""The layers that networks consist of: dense layer, convolution, normalisations, dropout.

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
import numpy as np
from jaxtyping import Array, Float, UInt32

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


class Dropout(nn.Module):
    """In training, sets each number to 0 with probability `rate` and divides the others by 1 - rate
    (Srivastava et al. 2014)."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], train: bool) -> Float[Array, "..."]:
        if not train or self.rate == 0:
            return x
        return dropout(x, jax.random.key_data(self.make_rng("dropout")), self.rate)


@functools.partial(jax.jit, static_argnums=2)  # so that equal shapes are traced once
def dropout(x: Float[Array, "..."], key: UInt32[Array, "2"], rate: float) -> Float[Array, "..."]:
    """See `Dropout`. What is kept depends on the key and the position alone."""
    kept = random_bits(key, x.shape) >= np.uint32(rate * 2**32)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def random_bits(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """32 random bits for each position: a hash of the key and of the position's index.

    A mask needs no more than bits that look independent. The hash takes 16 operations, where JAX's
    generator takes about 100, and it fuses with what uses it, so that it is neither stored nor
    compiled as a program of its own. Positions whose indices differ by 2**32 get the same bits.
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index, stride = index + place * np.uint32(stride % 2**32), stride * shape[axis]
    return hashed(hashed(index * np.uint32(0x9E3779B9) + key[0]) ^ key[1])


def hashed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit of x changes each bit of the result with probability
    1/2 (C. Wellons, "Hash function prospector", 2018, lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
