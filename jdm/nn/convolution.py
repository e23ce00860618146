"""Convolution of images [B, H, W, C] with a kernel [size, size, C, D], padded to keep its centre.

On a CPU, XLA is slow at the derivative of a 3×3 convolution with respect to its kernel: 2 to 57
GFLOP/s where a product of matrices has about 110 (docs/performance.md). `conv3x3` computes it by
products of matrices,

    dK[i, j] = sum over images and positions (y, x) of  X[y + i - 1, x + j - 1]ᵀ G[y, x]

for the gradient G of the output, with X zero outside the image. For each i one product yields all
three j: its right factor is G moved by 1, 0 and -1 along x, side by side. It is the faster one from
FEWEST channels on (docs/performance.md, benchmarks/convolution.py). It has no forward-mode
derivative (jax.jvp).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kernel = Float[Array, "size size c d"]
Maps = Float[Array, "b h w c"]

FEWEST = 32  # channels, both of the input and of the output


def conv(x: Maps, kernel: Kernel, stride: int = 1) -> Float[Array, "b h2 w2 d"]:
    """The convolution, with the derivatives that are the fastest on the default device."""
    size, _, *channels = kernel.shape
    if size == 3 and stride == 1 and min(channels) >= FEWEST and jax.default_backend() == "cpu":
        return conv3x3(x, kernel)
    return xla(x, kernel, stride)


def xla(x: Maps, kernel: Kernel, stride: int = 1) -> Float[Array, "b h2 w2 d"]:
    """The convolution, with the derivatives of XLA."""
    padding = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.custom_vjp
def conv3x3(x: Maps, kernel: Kernel) -> Float[Array, "b h w d"]:
    """A 3×3 convolution of stride 1, with its own derivatives."""
    return xla(x, kernel)


def _forward(x, kernel):
    return xla(x, kernel), (x, kernel)


@jax.jit  # so that equal shapes are traced once
def _backward(kept, gradient):
    x, kernel = kept
    dx = xla(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    _, height, width, channels = x.shape
    wide = jnp.pad(gradient, [(0, 0), (0, 0), (1, 1), (0, 0)])
    moved = jnp.concatenate([wide[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1)
    right = moved.reshape(-1, moved.shape[-1])
    high = jnp.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)])
    rows = [high[:, i : i + height].reshape(-1, channels).T @ right for i in range(3)]
    return dx, jnp.stack(rows).reshape(3, channels, 3, -1).swapaxes(1, 2)


conv3x3.defvjp(_forward, _backward)
