"""Shares: what is computed image by image, shared between the processes of an evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jdm import distributed


def in_shares(function: Callable[[slice], Any], rows: int, shared: bool) -> Any:
    """The rows 0 to rows - 1 of what a function computes row by row: for a slice of the rows it
    returns an array, or a tree of arrays, with as many.

    shared: the processes of a run, which all call this together, compute a share of the rows each,
    and all get all rows, bit by bit. Otherwise this process computes all of them.
    """
    if not shared or distributed.count() == 1 or not rows:
        return function(slice(0, rows))
    processes = distributed.count()
    share = -(-rows // processes)
    # All shares have one size, and none is empty: the last rows may be computed twice.
    starts = [min(i * share, rows - share) for i in range(processes)]
    start = starts[distributed.index()]
    found = function(slice(start, start + share))

    def of_all(ours: np.ndarray) -> np.ndarray:
        whole = np.empty((rows, *ours.shape[1:]), ours.dtype)
        for start, theirs in zip(starts, distributed.gathered(ours), strict=True):
            whole[start : start + share] = theirs
        return whole

    return jax.tree.map(of_all, found)
