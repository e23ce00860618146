"""Warm starts: a run that begins with the weights of another.

Owns what is taken over and what stays new. Of two runs on other data, or with other classes, the
networks are the same and the heads may differ: a head's array that does not fit stays as it was
initialised. Anything else that does not fit is an error, since the network would be another.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jdm.training.step import TrainState


def new_arrays(ours: Any, saved: Any) -> list[str]:
    """Names of the arrays of {params, batch_stats} that `saved` has nothing for.

    Raises ValueError, naming the first, where one of the network's does not fit, or `saved` has one
    that the network lacks.
    """
    ours, saved = flatten_dict(ours), flatten_dict(saved)

    def describe(tree, path):
        return f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing"

    differ = [path for path in ours | saved if describe(ours, path) != describe(saved, path)]
    unfit = [path for path in differ if path[1] != "head"]
    if unfit:
        more = f"; {len(unfit) - 1} more differ" if len(unfit) > 1 else ""
        raise ValueError(
            f"its network is another: {'/'.join(unfit[0][1:])} is {describe(saved, unfit[0])} "
            f"there and {describe(ours, unfit[0])} here{more}"
        )
    return ["/".join(path[1:]) for path in differ if path in ours]


def warm_started(state: TrainState, saved: Any) -> TrainState:
    """A state before its first step, with the saved {params, batch_stats} where they fit."""
    ours = {"params": state.params, "batch_stats": state.batch_stats}
    new, flat = set(new_arrays(ours, saved)), flatten_dict(saved)
    weights = unflatten_dict(
        {
            path: x if "/".join(path[1:]) in new else flat[path]
            for path, x in flatten_dict(ours).items()
        }
    )
    weights = {**ours, **weights}  # an empty collection has no path
    ema = jax.tree.map(jnp.copy, weights)  # of its own, since the step gives its state away
    return state.replace(**weights, ema=ema)
