"""One step of joint training: a pure function of a state and a batch.

A step (a) draws a noise level t for each image, (b) noises the images, and augments those for the
classifier, (c) computes the joint loss and its gradient, and (d) updates the weights, their EMA and
the history of t. Arrays are global: jit divides the work according to their shardings.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, Key
from optax import GradientTransformation

from jdm.nn.model import JointModel, example_inputs
from jdm.training.t_sampler import TSampler
from jdm.training.terms.base import Batch, Keys, Metrics, PerRow

# Each use of randomness in a step has a stream of keys. A stream's position determines its keys, so
# a new stream must be added at the end.
STREAMS = ("t", "noise", "dropout", "augment")


@struct.dataclass
class TrainState:
    """What a training step changes. The same class holds the shapes or shardings of a state.

    step: the number of steps done, int32 []. batch_stats: running statistics of the head, {} if it
    has none. ema: exponential moving average of {params, batch_stats}. optimiser: the state of the
    optimiser. t_history: the history of the `TSampler`.
    """

    step: Any
    params: Any
    batch_stats: Any
    ema: Any
    optimiser: Any
    t_history: Any = None


def init_state(
    model: JointModel, optimiser: GradientTransformation, t_sampler: TSampler, root: Key[Array, ""]
) -> TrainState:
    """The state before the first step, with random weights."""
    weights = {"batch_stats": {}, **model.init(root, *example_inputs(model))}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **weights,
        ema=jax.tree.map(jnp.copy, weights),  # a copy: a step cannot donate a buffer twice
        optimiser=optimiser.init(weights["params"]),
        t_history=t_sampler.init(),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    root: Key[Array, ""],
    *,
    loss_fn: Any,
    t_sampler: TSampler,
    optimiser: GradientTransformation,
    decay: float,
    accumulate: int,
    warmup: bool,
    gather: Callable[[Any], Any] = lambda params: params,
    split: Callable[[Any], Any] = lambda gradient: gradient,
) -> tuple[TrainState, Metrics]:
    """(next state, metrics {name: (sum, count)}): one gradient step on the joint loss.

    root: the key of the whole run. loss_fn: a JointLoss. decay, warmup: see `ema_decay`.
    accumulate: the number of parts, see `loss_gradient`. gather, split: where each device has a
    part of the parameters, how it gets the others, and is left with its part of the gradient;
    neither changes a value.
    """
    keys = step_keys(root, state.step)
    t, importance = t_sampler.draw(keys["t"], state.t_history, len(batch["image"]))
    rows = loss_fn.rows(batch, t, importance, keys, state.step)
    (gradient, loss, metrics), batch_stats, values = loss_gradient(
        loss_fn, gather(state.params), state.batch_stats, rows, keys["dropout"], accumulate
    )
    gradient = split(gradient)
    updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
    weights = {"params": optax.apply_updates(state.params, updates), "batch_stats": batch_stats}
    next_state = TrainState(
        state.step + 1,
        **weights,
        ema=update_ema(state.ema, weights, ema_decay(state.step, decay, warmup)),
        optimiser=optimiser_state,
        t_history=t_sampler.update(state.t_history, t, values),
    )
    one = jnp.ones((), jnp.float32)
    metrics |= {"loss": (loss, one), "gradient_norm": (optax.tree.norm(gradient), one)}
    return next_state, metrics


def step_keys(root: Key[Array, ""], step: Int[Array, ""]) -> Keys:
    """A key for each stream, from the root and the step alone, so a resumed run draws the same."""
    key = jax.random.fold_in(root, step)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def loss_gradient(
    loss_fn: Callable, params: Any, batch_stats: Any, rows: Any, key: Key[Array, ""], parts: int
) -> tuple[tuple[Any, Array, Metrics], Any, dict[str, PerRow]]:
    """((gradient, loss, metrics), the next batch_stats, {term: values [B]}) for a batch.

    The batch is processed in `parts` equal parts, one after the other, with the memory that one
    part needs. Gradients, losses and metrics are summed over the parts, and are those of the whole
    batch, except with a head that normalises over the batch: it sees one part. Each part begins
    with the batch_stats of the part before. key: for dropout. On a CPU more than one part is slow:
    XLA runs convolutions inside a loop several times slower.
    """

    def of_part(batch_stats, rows, key):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (batch_stats, metrics, values)), gradient = grad_fn(params, batch_stats, rows, key)
        return (gradient, loss, metrics), batch_stats, values

    if parts == 1:
        return of_part(batch_stats, rows, key)

    def add_part(carry, part):
        sums, batch_stats = carry
        more, batch_stats, values = of_part(batch_stats, *part)
        return (jax.tree.map(jnp.add, sums, more), batch_stats), values

    # Part i holds the rows i, parts + i, 2 · parts + i, ...: the same number from each device.
    rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)
    each = rows, jax.random.split(key, parts)
    shapes, *_ = jax.eval_shape(of_part, batch_stats, *jax.tree.map(lambda x: x[0], each))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (sums, batch_stats), values = jax.lax.scan(add_part, (zeros, batch_stats), each)
    return sums, batch_stats, jax.tree.map(lambda x: x.T.reshape(-1), values)


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Array:
    """`decay`; with a warm-up min(decay, (1 + step) / (10 + step)), which is lower at first."""
    return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.float32(decay)


def update_ema(ema: Any, weights: Any, decay: Array) -> Any:
    """decay · ema + (1 - decay) · weights, for every array; integers are copied from weights."""

    def update(old, new):
        if jnp.issubdtype(new.dtype, jnp.integer):
            return new
        return old + (1 - decay) * (new - old)  # exact for a weight that does not change

    return jax.tree.map(update, ema, weights)
