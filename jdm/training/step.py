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

from jdm.training.t_sampler import TSampler

# Every use of randomness inside a step has a stream of its own; a new one goes at the end.
STREAMS = ("t", "noise", "dropout")


@struct.dataclass
class TrainState:
    """What changes from step to step; also its shapes or shardings, in the same places.

    step: how many were done, int32 []. ema: moving average of params. optimiser: its state.
    t_history: what the draws of t depend on, None where they depend on nothing.
    """

    step: Any
    params: Any
    ema: Any
    optimiser: Any
    t_history: Any = None


def step_keys(root: Key[Array, ""], step: Int[Array, ""]) -> dict[str, Key[Array, ""]]:
    """One key per stream, from the root key and the step alone: nothing to store, or to resume."""
    key = jax.random.fold_in(root, step)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def ema_decay(step: Int[Array, ""], decay: float) -> Array:
    """min(decay, (1 + t) / (10 + t)): short memory while the weights still move fast."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def init_state(
    model, optimiser: optax.GradientTransformation, t_sampler: TSampler, root: Key[Array, ""]
) -> TrainState:
    """The state before the first step."""
    x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    params = model.init(root, x, jnp.zeros((1,), jnp.int32))["params"]
    ema = jax.tree.map(jnp.copy, params)  # of its own, since the step gives its state away
    step, t_history = jnp.zeros((), jnp.int32), t_sampler.init()
    return TrainState(step, params, ema, optimiser.init(params), t_history)


def gradient(
    loss_fn: Callable, params: Any, rows: Any, key: Key[Array, ""], parts: int
) -> tuple[tuple[Any, Array, dict], Array]:
    """((gradient, loss, averages), diffusion terms [B]) of the rows, taken in so many parts.

    The parts follow one another, so that the memory of one is enough, and their losses and
    gradients are summed. (On CPUs, XLA is several times slower at convolutions inside a loop.)
    key: of the dropout.
    """

    def of(rows, key):
        (loss, (averages, terms)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, rows, key
        )
        return (grads, loss, averages), terms

    if parts == 1:
        return of(rows, key)

    # Part i takes the rows i, parts + i, 2 · parts + i, ...: as many of each device's own rows.
    def split(x):
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(sums, part):
        more, terms = of(*part)
        return jax.tree.map(jnp.add, sums, more), terms

    each = jax.tree.map(split, rows), jax.random.split(key, parts)
    shapes, _ = jax.eval_shape(of, *jax.tree.map(lambda x: x[0], each))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, terms = jax.lax.scan(add, zeros, each)
    return sums, terms.T.reshape(-1)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    root: Key[Array, ""],
    *,
    loss_fn: Callable,
    t_sampler: TSampler,
    optimiser: optax.GradientTransformation,
    decay: float,
    accumulate: int,
) -> tuple[TrainState, dict]:
    """(next state, averages as (sum, count)): one gradient of the joint loss over shared weights.

    batch: {image, label}. loss_fn: see `JointLoss`: `rows` says what is asked of the network, a
    call what its answers cost. accumulate: parts the batch is taken in, one after the other.
    """
    keys = step_keys(root, state.step)
    t, counts = t_sampler.draw(keys["t"], state.t_history, len(batch["image"]))
    rows = loss_fn.rows(batch, t, counts, keys["noise"], state.step)
    (grads, loss, averages), terms = gradient(
        loss_fn, state.params, rows, keys["dropout"], accumulate
    )
    updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = ema_decay(state.step, decay)
    # Written so that what does not change keeps its average to the bit.
    ema = jax.tree.map(lambda old, new: old + (1 - keep) * (new - old), state.ema, params)
    t_history = t_sampler.update(state.t_history, t, terms)
    one = jnp.ones(())
    averages |= {"loss": (loss, one), "gradient_norm": (optax.tree.norm(grads), one)}
    return TrainState(state.step + 1, params, ema, optimiser_state, t_history), averages
