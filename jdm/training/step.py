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
STREAMS = ("t", "noise", "dropout", "augment")


@struct.dataclass
class TrainState:
    """What changes from step to step; also its shapes or shardings, in the same places.

    step: how many were done, int32 []. batch_stats: running statistics of the head, {} where it
    keeps none. ema: moving average of the weights {params, batch_stats}. optimiser: its state.
    t_history: what the draws of t depend on, None where they depend on nothing.
    """

    step: Any
    params: Any
    batch_stats: Any
    ema: Any
    optimiser: Any
    t_history: Any = None


def step_keys(root: Key[Array, ""], step: Int[Array, ""]) -> dict[str, Key[Array, ""]]:
    """One key per stream, from the root key and the step alone: nothing to store, or to resume."""
    key = jax.random.fold_in(root, step)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Array:
    """decay, or with a warm-up min(decay, (1 + t) / (10 + t)): a short memory at first."""
    return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.float32(decay)


def average(old: Any, new: Any, keep: Array) -> Any:
    """keep · old + (1 - keep) · new of every array; of a counter, which is whole, the new.

    Written so that what does not change keeps its average to the bit.
    """

    def move(old, new):
        whole = jnp.issubdtype(new.dtype, jnp.integer)
        return new if whole else old + (1 - keep) * (new - old)

    return jax.tree.map(move, old, new)


def init_state(
    model, optimiser: optax.GradientTransformation, t_sampler: TSampler, root: Key[Array, ""]
) -> TrainState:
    """The state before the first step."""
    x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    weights = {"batch_stats": {}, **model.init(root, x, jnp.zeros((1,), jnp.int32))}
    ema = jax.tree.map(jnp.copy, weights)  # of its own, since the step gives its state away
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **weights,
        ema=ema,
        optimiser=optimiser.init(weights["params"]),
        t_history=t_sampler.init(),
    )


def gradient(
    loss_fn: Callable, params: Any, batch_stats: Any, rows: Any, key: Key[Array, ""], parts: int
) -> tuple[tuple[Any, Array, dict], Any, Array]:
    """((gradient, loss, averages), batch_stats, diffusion terms [B]) of the rows, in so many parts.

    The parts follow one another, so that the memory of one is enough; their losses and gradients
    are summed, and the head's statistics go from one to the next. (On CPUs, XLA is several times
    slower at convolutions inside a loop.) key: of the dropout.
    """

    def of(batch_stats, rows, key):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, aux), grads = grad_fn(params, batch_stats, rows, key)
        batch_stats, averages, terms = aux
        return (grads, loss, averages), batch_stats, terms

    if parts == 1:
        return of(batch_stats, rows, key)

    # Part i takes the rows i, parts + i, 2 · parts + i, ...: as many of each device's own rows.
    def split(x):
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(carry, part):
        sums, batch_stats = carry
        more, batch_stats, terms = of(batch_stats, *part)
        return (jax.tree.map(jnp.add, sums, more), batch_stats), terms

    each = jax.tree.map(split, rows), jax.random.split(key, parts)
    shapes, *_ = jax.eval_shape(of, batch_stats, *jax.tree.map(lambda x: x[0], each))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (sums, batch_stats), terms = jax.lax.scan(add, (zeros, batch_stats), each)
    return sums, batch_stats, terms.T.reshape(-1)


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
    warmup: bool,
) -> tuple[TrainState, dict]:
    """(next state, averages as (sum, count)): one gradient of the joint loss over shared weights.

    batch: {image, label}. loss_fn: see `JointLoss`: `rows` says what is asked of the network, a
    call what its answers cost. decay, warmup: of the moving average, see `ema_decay`. accumulate:
    parts the batch is taken in, one after the other.
    """
    keys = step_keys(root, state.step)
    t, counts = t_sampler.draw(keys["t"], state.t_history, len(batch["image"]))
    rows = loss_fn.rows(batch, t, counts, keys, state.step)
    (grads, loss, averages), batch_stats, terms = gradient(
        loss_fn, state.params, state.batch_stats, rows, keys["dropout"], accumulate
    )
    updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    weights = {"params": params, "batch_stats": batch_stats}
    ema = average(state.ema, weights, ema_decay(state.step, decay, warmup))
    t_history = t_sampler.update(state.t_history, t, terms)
    one = jnp.ones(())
    averages |= {"loss": (loss, one), "gradient_norm": (optax.tree.norm(grads), one)}
    state = TrainState(
        state.step + 1, **weights, ema=ema, optimiser=optimiser_state, t_history=t_history
    )
    return state, averages
