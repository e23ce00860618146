"""One step of joint training: pure functions of a state and a batch.

Owns TrainState and its update. Does not know the mesh: the arrays are global, and jit splits the
work the way they are laid out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, Key

# Every use of randomness inside a step has a stream of its own; a new one goes at the end.
STREAMS = ("t", "noise", "dropout")


@struct.dataclass
class TrainState:
    """What changes from step to step; also its shapes or shardings, in the same places.

    step: how many were done, int32 []. batch_stats: running statistics of the head, {} where it
    keeps none. ema: moving average of the weights {params, batch_stats}. optimiser: its state.
    """

    step: Any
    params: Any
    batch_stats: Any
    ema: Any
    optimiser: Any


def step_keys(root: Key[Array, ""], step: Int[Array, ""]) -> dict[str, Key[Array, ""]]:
    """One key per stream, from the root key and the step alone: nothing to store, or to resume."""
    key = jax.random.fold_in(root, step)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Array:
    """decay, or with a warm-up min(decay, (1 + t) / (10 + t)): a short memory at first."""
    return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.float32(decay)


def average(old: Any, new: Any, keep: Array) -> Any:
    """keep · old + (1 - keep) · new of every array; of a counter, which is whole, the new."""

    def move(old, new):
        whole = jnp.issubdtype(new.dtype, jnp.integer)
        return new if whole else keep * old + (1 - keep) * new

    return jax.tree.map(move, old, new)


def init_state(model, optimiser: optax.GradientTransformation, root: Key[Array, ""]) -> TrainState:
    """The state before the first step."""
    x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    weights = {"batch_stats": {}, **model.init(root, x, jnp.zeros((1,), jnp.int32))}
    ema = jax.tree.map(jnp.copy, weights)  # of its own, since the step gives its state away
    step, optimiser_state = jnp.zeros((), jnp.int32), optimiser.init(weights["params"])
    return TrainState(step, **weights, ema=ema, optimiser=optimiser_state)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    root: Key[Array, ""],
    *,
    loss_fn: Callable,
    optimiser: optax.GradientTransformation,
    decay: float,
    warmup: bool,
) -> tuple[TrainState, dict]:
    """(next state, averages): one gradient of the joint loss over shared weights.

    loss_fn: (params, batch_stats, batch, keys) -> (loss, (the next batch_stats, averages as
    (sum, count))). decay, warmup: of the moving average, see `ema_decay`.
    """
    keys = step_keys(root, state.step)
    grad_fn = jax.grad(loss_fn, has_aux=True)
    grads, (batch_stats, averages) = grad_fn(state.params, state.batch_stats, batch, keys)
    updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    weights = {"params": params, "batch_stats": batch_stats}
    ema = average(state.ema, weights, ema_decay(state.step, decay, warmup))
    averages["gradient_norm"] = (optax.tree.norm(grads), jnp.ones(()))
    return TrainState(state.step + 1, params, batch_stats, ema, optimiser_state), averages
