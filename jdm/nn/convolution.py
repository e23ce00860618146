"""Convolution of images [B, H, W, C] with a kernel [size, size, C, D], padded to keep its centre.

On a CPU, XLA's 3×3 convolutions of small images, and the derivative with respect to the kernel for
images of any size, are slower than products of matrices (docs/performance.md). `conv3x3` computes
them as such products. With X zero outside the image, and three positions side by side,

    X3[y, x] = (X[y, x - 1], X[y, x], X[y, x + 1])          3 C channels

one product of X3 with the kernel yields what each row of X adds to three rows of the output. The
derivative with respect to X is the convolution of the gradient G with the flipped kernel. That with
respect to the kernel,

    dK[i, j] = sum over images and positions (y, x) of  X[y + i - 1, x + j - 1]ᵀ G[y, x],

is one product of X3 with three rows of G side by side. All of it is done for a few images at a
time, whose numbers fit in the cache; a batch that is split over devices is gathered for that.
conv3x3 has no forward-mode derivative (jax.jvp).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdm.target import platform

Kernel = Float[Array, "size size c d"]
Maps = Float[Array, "b h w c"]

# Chosen by benchmarks/convolution.py:
FEWEST = 32  # channels of input and output from which conv3x3 is faster
LARGE = 1024  # positions of an image from which XLA is as fast, except for the kernel's derivative
CACHED = 2**18  # numbers of the input or the output of the images of one product


def conv(x: Maps, kernel: Kernel, stride: int = 1) -> Float[Array, "b h2 w2 d"]:
    """The convolution, in the way that is the fastest on the default device."""
    size, _, *channels = kernel.shape
    if size == stride == 1:
        return x @ kernel[0, 0]
    if size == 3 and stride == 1 and min(channels) >= FEWEST and platform() == "cpu":
        return conv3x3(x, kernel)
    return xla(x, kernel, stride)


def xla(x: Maps, kernel: Kernel, stride: int = 1) -> Float[Array, "b h2 w2 d"]:
    """The convolution as XLA has it."""
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
    """A 3×3 convolution of stride 1."""
    return _forward(x, kernel)[0]


@jax.jit  # so that equal shapes are traced once
def _forward(x, kernel):
    if is_large(x):
        return xla(x, kernel), (x, kernel)
    *_, c, d = kernel.shape
    right = kernel.transpose(1, 2, 0, 3).reshape(3 * c, 3 * d)
    (parts,) = in_parts(kernel, x)
    return jax.lax.map(lambda x: product(x, right), parts).reshape(*x.shape[:-1], d), (x, kernel)


@jax.jit
def _backward(kept, gradient):
    x, kernel = kept
    *_, c, d = kernel.shape
    parts = in_parts(kernel, x, gradient)
    flipped = jnp.flip(kernel, (0, 1))
    if is_large(x):
        dx = xla(gradient, flipped.swapaxes(2, 3))
    else:
        # Its channels d stay the last axis: a product takes a transposed matrix as it is.
        right = flipped.transpose(0, 2, 1, 3).reshape(3 * c, 3 * d).T
        dx = jax.lax.map(lambda g: product(g, right), parts[1]).reshape(x.shape)

    def add_part(dk, part):
        x, gradient = part
        x3 = side_by_side(x, axis=2).reshape(-1, 3 * c)
        rows = side_by_side(gradient, axis=1).reshape(-1, 3 * d)
        return dk + jnp.matmul(x3.T, rows, preferred_element_type=jnp.float32), None

    dk, _ = jax.lax.scan(add_part, jnp.zeros((3 * c, 3 * d), jnp.float32), parts)
    # [3 (j), C, 3, D] -> [3 (i), 3 (j), C, D]. A row of X meets G of the row below with i = 0.
    dk = jnp.flip(dk.reshape(3, c, 3, d).transpose(2, 0, 1, 3), 0)
    return dx, dk.astype(kernel.dtype)


conv3x3.defvjp(_forward, _backward)


def is_large(x: Maps) -> bool:
    return x.shape[1] * x.shape[2] >= LARGE


def in_parts(
    kernel: Kernel, *maps: Float[Array, "b h w _"]
) -> list[Float[Array, "parts images h w _"]]:
    """The maps, in parts of equally many images, at least one, with at most CACHED numbers."""
    b, height, width, _ = maps[0].shape
    fit = CACHED // (height * width * max(kernel.shape[2:]))
    images = max(n for n in range(1, b + 1) if b % n == 0 and n <= max(fit, 1))
    return [x.reshape(b // images, images, *x.shape[1:]) for x in maps]


def product(x: Maps, right: Float[Array, "c3 d3"]) -> Float[Array, "b h w d"]:
    """What each row of x adds to the rows below, at and above it, added up."""
    wide = jnp.matmul(side_by_side(x, axis=2), right, preferred_element_type=jnp.float32)
    below, at, above = jnp.split(wide, 3, axis=-1)
    return (moved(below, 1, axis=1) + at + moved(above, -1, axis=1)).astype(x.dtype)


def side_by_side(x: Maps, axis: int) -> Float[Array, "b h w c3"]:
    """The channels before each position along the axis, at it, and after it; 0 outside."""
    return jnp.concatenate([moved(x, 1, axis), x, moved(x, -1, axis)], axis=-1)


def moved(x: Maps, by: int, axis: int) -> Maps:
    """The maps moved along the axis by 1 or -1, with zeros where they come from outside."""
    zeros = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
    if by > 0:
        return jnp.concatenate([zeros, jax.lax.slice_in_dim(x, 0, -1, axis=axis)], axis)
    return jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, axis=axis), zeros], axis)
