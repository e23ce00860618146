"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), in several implementations.

For each image and head, softmax(q kᵀ / sqrt(d)) v over P positions with d channels. All
implementations compute the same up to rounding; they differ in speed and memory:

xla      all B · H score matrices [P, P] at once. The derivative keeps them.
chunked  the score matrix of one image and head at a time, in parts of at most MOST_QUERIES rows.
         None is kept: the derivative computes them again (as in Dao et al. 2022,
         "FlashAttention"). The memory is linear in P.
fused    one kernel, memory linear in P: on NVIDIA GPUs cuDNN's, in half precision; on TPUs that
         of jdm.nn.attention_tpu.
auto     chunked on a CPU from LARGE positions on; fused on a TPU, where it fits; xla otherwise.

On a CPU chunked is faster for many positions, since the matrix of one head fits in the cache, and
slower for few (docs/performance.md). On a TPU fused moves less memory than xla by XLA's count
(docs/plan.md). On GPUs and TPUs none was measured. chunked and fused have no forward-mode
derivative (jax.jvp).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jdm import names
from jdm.target import platform

Projected = Float[Array, "b p c3"]  # q, k and v of all heads, as one projection computes them
Heads = Float[Array, "b p h d"]

# Layout of the 3C channels of the projection: (heads, channels of a head) -> (the shape that they
# are split into, the axis of (q, k, v) in that shape).
ATTENTION_ORDERS = names.ATTENTION_ORDERS.records(
    {
        "head_first": lambda heads, d: ((heads, 3, d), 1),
        "qkv_first": lambda heads, d: ((3, heads, d), 0),
    }
)

MOST_QUERIES = 1024  # rows of a score matrix at a time
LARGE = 128  # positions from which on auto is chunked, on a CPU
FEW = 64  # positions below which auto is not fused, on a TPU


def xla(q: Heads, k: Heads, v: Heads) -> Heads:
    # Scaling both before the product keeps it in range in half precision.
    scale = q.shape[-1] ** -0.25
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k * scale).astype(jnp.float32)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


@jax.custom_vjp
def chunked(q: Heads, k: Heads, v: Heads) -> Heads:
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    """(the output, the logarithm of the sum of exponentials of each row of scores)."""

    def of_head(head):
        queries, k, v = head
        v1 = _with(v, jnp.ones_like(v[:, :1]))  # the product then includes the sums of the weights

        def of_part(q):
            scores = _scores(q, k)
            top = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - top).astype(v.dtype)
            sums = jnp.matmul(weights, v1, preferred_element_type=jnp.float32)
            out, total = sums[:, :-1], sums[:, -1:]
            return (out / total).astype(v.dtype), top + jnp.log(total)

        return jax.lax.map(of_part, queries)

    out, log_sums = jax.lax.map(of_head, (_parts(q), _heads(k), _heads(v)))
    return _joined(out, q), (q, k, v, out, log_sums)


def _backward(kept, gradient):
    """With P = softmax of the scores and D = diag(P dPᵀ): dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - D),
    dQ = dS K, dK = dSᵀ Q (Dao et al. 2022, algorithm 4)."""
    q, k, v, out, log_sums = kept
    scale = q.shape[-1] ** -0.5

    def of_head(head):
        k, v, *parts = head
        v1 = _with(v, jnp.ones_like(v[:, :1])).astype(jnp.float32)

        def of_part(sums, part):
            q, out, log_sums, gradient = part
            weights = jnp.exp(_scores(q, k) - log_sums)
            d = (out * gradient).astype(jnp.float32).sum(axis=-1, keepdims=True)
            errors = weights * (_with(gradient, -d) @ v1.T)  # with the scale below, dS
            weights, errors = weights.astype(v.dtype), errors.astype(q.dtype)
            more = errors.T @ (q * scale), weights.T @ gradient
            return jax.tree.map(jnp.add, sums, more), errors @ (k * scale)

        (dk, dv), dq = jax.lax.scan(of_part, (jnp.zeros_like(k), jnp.zeros_like(v)), parts)
        return dq, dk, dv

    each = _heads(k), _heads(v), _parts(q), out, log_sums, _parts(gradient)
    dq, dk, dv = jax.lax.map(of_head, each)
    return _joined(dq, q), _joined(dk, k), _joined(dv, v)


chunked.defvjp(_forward, _backward)


def _with(x: Float[Array, "p d"], more: Float[Array, "p 1"]) -> Float[Array, "p d1"]:
    """x with one more channel."""
    return jnp.concatenate([x, more], axis=-1)


def _scores(q: Float[Array, "q d"], k: Float[Array, "p d"]) -> Float[Array, "q p"]:
    scale = q.shape[-1] ** -0.25
    return ((q * scale) @ (k * scale).T).astype(jnp.float32)


def _heads(x: Heads) -> Float[Array, "bh p d"]:
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])


def _parts(x: Heads) -> Float[Array, "bh parts q d"]:
    """The heads, split into parts of the same number of positions, at most MOST_QUERIES."""
    positions, width = x.shape[1], x.shape[3]
    size = max(n for n in range(1, min(positions, MOST_QUERIES) + 1) if positions % n == 0)
    return _heads(x).reshape(-1, positions // size, size, width)


def _joined(x: Float[Array, "bh ... d"], like: Heads) -> Heads:
    b, positions, heads, width = like.shape
    return jnp.moveaxis(x.reshape(b, heads, positions, width), 1, 2)


def separate(qkv: Projected, heads: int, order: str) -> tuple[Heads, Heads, Heads]:
    """(q, k, v) of a projection. order: of ATTENTION_ORDERS."""
    shape, axis = ATTENTION_ORDERS[order](heads, qkv.shape[-1] // (3 * heads))
    return tuple(jnp.moveaxis(qkv.reshape(*qkv.shape[:2], *shape), 2 + axis, 0))


def first_channels(channels: int, heads: int, order: str) -> Int[np.ndarray, "3 heads"]:
    """The first of the 3C channels that (q, k, v) of each head have, where they have C."""
    shape, axis = ATTENTION_ORDERS[order](heads, channels // heads)
    return np.moveaxis(np.arange(3 * channels).reshape(shape), axis, 0)[..., 0]


def of_heads(attend: Callable[[Heads, Heads, Heads], Heads]) -> Callable[..., Array]:
    """An implementation for (q, k, v) as one for projections."""

    def attend_projected(qkv: Projected, heads: int, order: str) -> Float[Array, "b p c"]:
        return attend(*separate(qkv, heads, order)).reshape(*qkv.shape[:2], -1)

    return attend_projected


def auto(qkv: Projected, heads: int, order: str) -> Float[Array, "b p c"]:
    here, positions, width = platform(), qkv.shape[1], qkv.shape[2] // (3 * heads)
    fits = here == "tpu" and not why_not_fused(str(qkv.dtype), positions, heads, width)
    if fits and positions >= FEW:
        return fused(qkv, heads, order)
    return of_heads(chunked if here == "cpu" and positions >= LARGE else xla)(qkv, heads, order)


def fused(qkv: Projected, heads: int, order: str) -> Float[Array, "b p c"]:
    if platform() == "tpu":
        from jdm.nn import attention_tpu  # imports Pallas

        return attention_tpu.attend(qkv, heads, order)
    return of_heads(_cudnn)(qkv, heads, order)


def _cudnn(q: Heads, k: Heads, v: Heads) -> Heads:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def why_not_fused(dtype: str, positions: int, heads: int, width: int) -> str:
    """What cuDNN's kernel does not do (NVIDIA cuDNN, "Scaled dot product attention"), or what is
    too large for that of TPUs."""
    if platform() == "tpu":
        from jdm.nn import attention_tpu  # imports Pallas

        needed, there = attention_tpu.needed(dtype, positions, heads * width), attention_tpu.MEMORY
        if needed > there:
            size = f"{positions} positions of {heads * width} channels"
            return f"needs {needed >> 20} MiB for {size}, and may use {there >> 20} on a TPU"
        return ""
    kind = jax.devices()[0].device_kind
    if "nvidia" not in kind.lower():
        return f"needs an NVIDIA GPU or a TPU, and JAX runs on {kind}"
    if dtype != "bfloat16":
        return f"needs config.exec.dtype='bfloat16', not {dtype!r}"
    if width % 8 or width > 128:
        return f"needs heads of 8, 16, ... or 128 channels, and the model has heads of {width}"
    return ""


class Attention(NamedTuple):
    """An implementation of config.exec.attention.

    attend: (qkv [B, P, 3C], heads, order of ATTENTION_ORDERS) -> [B, P, C]. why_not: (dtype, P,
    heads, channels of a head) -> why it cannot be used for these on the default device; "" where
    it can.
    """

    attend: Callable[[Projected, int, str], Float[Array, "b p c"]]
    why_not: Callable[[str, int, int, int], str] = lambda dtype, positions, heads, width: ""


ATTENTIONS: dict[str, Attention] = names.ATTENTIONS.records(
    auto=Attention(auto),
    xla=Attention(of_heads(xla)),
    chunked=Attention(of_heads(chunked)),
    fused=Attention(fused, why_not_fused),
)
