"""Attention on TPUs: one kernel, which keeps the score matrices in the memory of the compute unit.

Written in Pallas. The kernel is called once for each image. It reads q, k and v of all heads as
the projection has left them, and writes the output; the derivative computes the scores again, and
reads and writes as much. So the chip's memory is used for arrays that are linear in the number of
positions, and nothing is copied into another layout. Equations: jdm.nn.attention.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jdm.nn.attention import Projected, first_channels, of_heads, xla
from jdm.target import platform

# Bytes of the compute unit's memory (VMEM) that a kernel may use: the compiler's default, which is
# all of it up to v4; later chips have more.
MEMORY = 16 * 2**20


def needed(dtype: str, positions: int, channels: int) -> int:
    """Bytes of the compute unit's memory that the derivative needs: its arrays twice, since the
    next image is read while one is computed, and three matrices [P, P] of a head in float32."""
    arrays = 7 * positions * channels * jnp.dtype(dtype).itemsize
    return 2 * arrays + 3 * 4 * positions**2


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The matrix product over an axis of a and one of b, in float32."""
    numbers = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _softmax(q: Array, k: Array) -> Array:
    """The weights [P, P] of a head: softmax(q kᵀ / sqrt(d))."""
    scores = _product(q, k, (1, 1)) * q.shape[-1] ** -0.5
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _heads(channels: int, heads: int, order: str) -> Iterator[tuple[slice | pl.Slice, ...]]:
    """For each head: (channels of q, k and v in the projection, its channels in the output)."""
    width = channels // heads
    for head, starts in enumerate(first_channels(channels, heads, order).T.tolist()):
        yield tuple(pl.ds(start, width) for start in (*starts, head * width))


def _forward(heads: int, order: str, qkv, out) -> None:
    for q, k, v, channels in _heads(out.shape[-1], heads, order):
        weights = _softmax(qkv[0, :, q], qkv[0, :, k]).astype(out.dtype)
        out[0, :, channels] = _product(weights, qkv[0, :, v], (1, 0)).astype(out.dtype)


def _backward(heads: int, order: str, qkv, gradient, of_qkv) -> None:
    """With P the weights and D = diag(P dPᵀ): dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - D) / sqrt(d),
    dQ = dS K, dK = dSᵀ Q (Dao et al. 2022, algorithm 4)."""
    dtype = of_qkv.dtype
    for q, k, v, channels in _heads(gradient.shape[-1], heads, order):
        do = gradient[0, :, channels]
        weights = _softmax(qkv[0, :, q], qkv[0, :, k])
        errors = _product(do, qkv[0, :, v], (1, 1))
        errors = weights * (errors - (weights * errors).sum(axis=-1, keepdims=True))
        errors = (errors * do.shape[-1] ** -0.5).astype(dtype)
        of_qkv[0, :, q] = _product(errors, qkv[0, :, k], (1, 0)).astype(dtype)
        of_qkv[0, :, k] = _product(errors, qkv[0, :, q], (0, 0)).astype(dtype)
        of_qkv[0, :, v] = _product(weights.astype(dtype), do, (0, 0)).astype(dtype)


def _call(kernel: Callable, heads: int, order: str, width: int, products: int, *arrays) -> Array:
    """A kernel on each image of arrays [B, P, …], which returns [B, P, width]. products: matrix
    products with P² d multiplications that it does for a head, for the compiler's estimates."""
    images, positions, of_projection = arrays[0].shape
    out = jax.ShapeDtypeStruct((images, positions, width), arrays[0].dtype)
    cost = pl.CostEstimate(
        flops=2 * products * images * positions**2 * of_projection // 3,
        transcendentals=images * heads * positions**2,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, out)),
    )

    def of_image(x) -> pl.BlockSpec:
        return pl.BlockSpec((1, positions, x.shape[-1]), lambda image: (image, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, heads, order),
        grid=(images,),
        in_specs=[of_image(x) for x in arrays],
        out_specs=of_image(out),
        out_shape=out,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=platform() != "tpu",
    )(*arrays)


def _by_row(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of each row of its arrays, on the devices that the arrays lie on: XLA cannot
    split a kernel. Rows that do not divide by the devices are computed on each of them."""

    def on_devices(*arrays: Array) -> Array:
        mesh = jax.typeof(arrays[0]).sharding.mesh
        if mesh.size <= 1:  # 0 where the arrays are on no mesh
            return function(*arrays)
        divides = len(arrays[0]) % mesh.size == 0
        rows = PartitionSpec(mesh.axis_names) if divides else PartitionSpec()
        each = (rows,) * len(arrays)
        split = jax.shard_map(function, mesh=mesh, in_specs=each, out_specs=rows, check_vma=False)
        return split(*arrays)

    return on_devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(qkv: Projected, heads: int, order: str) -> Float[Array, "b p c"]:
    """See jdm.nn.attention.Attention. On other devices than TPUs the kernel is interpreted."""
    width = qkv.shape[-1] // 3
    return _by_row(functools.partial(_call, _forward, heads, order, width, 2))(qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gradient(qkv: Projected, of_output: Array, heads: int, order: str) -> Projected:
    width = qkv.shape[-1]
    return _by_row(functools.partial(_call, _backward, heads, order, width, 5))(qkv, of_output)


attend.defvjp(
    lambda qkv, heads, order: (attend(qkv, heads, order), qkv),
    lambda heads, order, qkv, of_output: (_gradient(qkv, of_output, heads, order),),
)


def _second(heads: int, order: str, arrays: tuple, gradient: Array) -> tuple:
    """The derivatives of `_gradient`, by those of the plain implementation."""

    def plain(qkv, of_output):
        return jax.vjp(lambda x: of_heads(xla)(x, heads, order), qkv)[1](of_output)[0]

    return jax.vjp(plain, *arrays)[1](gradient)


_gradient.defvjp(lambda qkv, g, *how: (_gradient(qkv, g, *how), (qkv, g)), _second)
