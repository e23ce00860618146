"""Warm starts: a run that begins with the weights of another run.

The UNets must be identical. The classifier heads may differ, for example in the number of classes:
an array of the head that does not fit keeps its initial value.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdm import trees
from jdm.errors import NO_VALUE, InvalidValue
from jdm.training.step import TrainState


def new_arrays(ours: Any, saved: Any) -> list[str]:
    """Names, such as head/out/kernel, of the arrays that keep their initial values.

    ours, saved: {params, batch_stats} of the new run and of the other one. Raises InvalidValue
    about config.train.init_from if an array outside the head is not in both, with the same shape
    and dtype.
    """
    # A name leaves out the collection, params or batch_stats.
    differ = {one.path.partition("/")[2]: one for one in trees.differences(ours, saved)}
    unfit = [name for name in differ if not name.startswith("head/")]
    if unfit:
        _, here, there = differ[unfit[0]]
        more = f"; {len(unfit) - 1} more differ" if len(unfit) > 1 else ""
        allowed = f"has another network: {unfit[0]} is {there} there and {here} here{more}"
        raise InvalidValue("config.train.init_from", NO_VALUE, allowed)
    return [name for name, found in differ.items() if found.wanted != "nothing"]


def warm_started(state: TrainState, saved: Any) -> TrainState:
    """The state before the first step, with the saved {params, batch_stats} where they fit."""
    ours = {"params": state.params, "batch_stats": state.batch_stats}
    differ, saved = {one.path for one in trees.differences(ours, saved)}, trees.leaves(saved)
    leaves = [
        x if path in differ else _placed(saved[path], x) for path, x in trees.leaves(ours).items()
    ]
    weights = jax.tree.unflatten(jax.tree.structure(ours), leaves)
    # The EMA is a copy: a buffer that a step donates twice is an error.
    ema = jax.tree.map(jnp.copy, weights)
    return state.replace(**weights, ema=ema)  # type: ignore[attr-defined]  # of flax.struct


def _placed(saved: jax.Array, ours: jax.Array) -> jax.Array:
    """A loaded array, which lies on the devices of this host, where ours lies."""
    if saved.sharding == ours.sharding:
        return saved
    whole = np.asarray(saved)
    return jax.make_array_from_callback(ours.shape, ours.sharding, lambda index: whole[index])
