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
STREAMS = ("t", "noise", "dropout", "augment")


@struct.dataclass
class TrainState:
    """What changes from step to step; also its shapes or shardings, in the same places.

    step: how many were done, int32 []. ema: moving average of params. optimiser: its state.
    """

    step: Any
    params: Any
    ema: Any
    optimiser: Any


def step_keys(root: Key[Array, ""], step: Int[Array, ""]) -> dict[str, Key[Array, ""]]:
    """One key per stream, from the root key and the step alone: nothing to store, or to resume."""
    key = jax.random.fold_in(root, step)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def ema_decay(step: Int[Array, ""], decay: float) -> Array:
    """min(decay, (1 + t) / (10 + t)): short memory while the weights still move fast."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def init_state(model, optimiser: optax.GradientTransformation, root: Key[Array, ""]) -> TrainState:
    """The state before the first step."""
    x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    params = model.init(root, x, jnp.zeros((1,), jnp.int32))["params"]
    ema = jax.tree.map(jnp.copy, params)  # of its own, since the step gives its state away
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimiser.init(params))


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    root: Key[Array, ""],
    *,
    loss_fn: Callable,
    optimiser: optax.GradientTransformation,
    decay: float,
) -> tuple[TrainState, dict]:
    """(next state, averages): one gradient of the joint loss over shared weights.

    loss_fn: (params, batch, keys) -> (loss, averages as (sum, count)).
    """
    keys = step_keys(root, state.step)
    grads, averages = jax.grad(loss_fn, has_aux=True)(state.params, batch, keys)
    updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = ema_decay(state.step, decay)
    ema = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.ema, params)
    averages["gradient_norm"] = (optax.tree.norm(grads), jnp.ones(()))
    return TrainState(state.step + 1, params, ema, optimiser_state), averages
