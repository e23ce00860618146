"""What all guidances share: the types Network and Guidance, and the gradients of (13)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdm.arrays import Images, Times
from jdm.diffusion.samplers.base import EpsFn
from jdm.errors import NO_VALUE, InvalidValue
from jdm.names import check_name

Targets = Float[Array, "b m"]
LABELLED = "labels", "scale", "scale_schedule"  # taken by all guidances that need targets
TINY = 1e-20  # avoids 0 / 0 where the gradient is 0: no targets, or a saturated classifier


class Network(NamedTuple):
    """A joint network as guidance sees it.

    encode: (x, t, perturbations=None) -> the features Z, a pytree of arrays [B, ...]. perturbations
    is a pytree like Z; each is added to its feature before later blocks read it. decode:
    (features, x, t) -> Estimate. log_probabilities: (features, t) -> [B, M], see
    `log_probabilities_of`. block_names: a pytree like Z, with the name of the block that computes
    each feature; None for a network whose blocks cannot be selected.
    """

    encode: Callable
    decode: Callable
    log_probabilities: Callable
    block_names: Any = None


class Guidance(NamedTuple):
    """One entry of GUIDANCE.

    make: (network, diffusion, method, targets, scale_fn) -> eps_fn, where scale_fn(t) is the scale
    at t. default_scale: chosen on the digits and on MNIST (docs/results.md); other data may need
    another. takes: what it uses and some other guidance does not: names of options of Method,
    "labels" (it needs targets), and "classifier" (its gradient may come from another model).
    sampler, steps, threshold: those of a Method that leaves them open.
    """

    make: Callable[..., EpsFn]
    default_scale: float
    takes: tuple[str, ...] = ()
    sampler: str = "ancestral"  # its noise corrects what guidance pushes off the data
    steps: int = 20  # with more, samples are less like real images (docs/results.md)
    threshold: str = "static"


def log_probabilities_of(logits: Float[Array, "b k"], multi_label: bool) -> Float[Array, "b m"]:
    """Log probabilities of the M outcomes: of K classes (M = K), or, with multi_label, of each of
    the K labels being on, then of each being off (M = 2 K)."""
    if multi_label:
        return jax.nn.log_sigmoid(jnp.concatenate([logits, -logits], axis=1))
    return jax.nn.log_softmax(logits)


def block_mask(block_names: Any, blocks: Sequence[str] | None) -> Any:
    """A pytree of bool like block_names: whether each name is in `blocks`. None, for all blocks, if
    `blocks` is None. Raises InvalidValue for a name that no block has, and for an empty list."""
    if blocks is None:
        return None
    known = jax.tree.leaves(block_names)
    for name in blocks:
        check_name("blocks", name, known)
    if not blocks:
        raise InvalidValue("blocks", NO_VALUE, "is empty", f"known: {', '.join(known)}")
    return jax.tree.map(lambda name: name in blocks, block_names)


def select(features: Any, mask: Any) -> Any:
    """The features, or a pytree like them, with zeros where the mask is False."""
    if mask is None:
        return features
    return jax.tree.map(lambda z, keep: z if keep else jnp.zeros_like(z), features, mask)


def log_likelihood(network: Network, features, t: Times, targets: Targets) -> Float[Array, ""]:
    """(13) summed over the batch. Its gradient with respect to row i is that of the i-th term."""
    return (targets * network.log_probabilities(features, t)).sum()


def gradients(network: Network, x: Images, t: Times, targets: Targets) -> tuple[Images, Any, Any]:
    """(g [B, H, W, C], dZ, Z) at (x, t)."""

    def objective(x, perturbations):
        features = network.encode(x, t, perturbations)
        return log_likelihood(network, features, t, targets), features

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(network.encode, x, t))
    # The gradient with respect to the perturbations is the total derivative dZ.
    (g, dz), features = jax.grad(objective, argnums=(0, 1), has_aux=True)(x, zeros)
    return g, dz, features


def dot(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """The inner product of each row, in float32."""
    return (a.astype(jnp.float32) * b).reshape(len(a), -1).sum(axis=1)


def per_row(values: Float[Array, " b"], x: Array) -> Array:
    """The values as [B, 1, ..., 1], with the dtype of x [B, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
