"""Hidden labels: training as if only a share of the images had been labelled.

Owns which labels stay. It is settled once, on the whole split and by the seed alone, before there
are batches or hosts: no order of calls can change it.
"""

import numpy as np
from jaxtyping import Int


def hide_labels(
    labels: Int[np.ndarray, "n ..."], fraction: float, seed: int
) -> Int[np.ndarray, "n ..."]:
    """The same labels with all but a fraction of them replaced by -1.

    labels: of one class each [N], or of several [N, K], which are kept or hidden row by row; those
    that are -1 already stay so, and count for nothing. fraction: in (0, 1], of all labels, and of
    each class as nearly as whole labels allow. seed: which ones.

    Raises ValueError for a fraction out of range, or one that leaves no label.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data.labelled_fraction={fraction} must be above 0 and at most 1")
    order = _order(len(labels), seed)
    rows = order[(labels >= 0).reshape(len(labels), -1).any(axis=1)[order]]
    total = round(fraction * len(rows))
    if total == 0 < len(rows):
        raise ValueError(f"data.labelled_fraction={fraction} of {len(rows)} labels leaves none")
    one_class = labels[rows] if labels.ndim == 1 else np.zeros(len(rows), int)
    classes, counts = np.unique(one_class, return_counts=True)
    shares = fraction * counts
    keep = np.floor(shares).astype(int)
    nearest_to_one_more = np.argsort(keep - shares, kind="stable")
    keep[nearest_to_one_more[: total - keep.sum()]] += 1

    hidden = np.full_like(labels, -1)
    for which, count in zip(classes, keep, strict=True):
        kept = rows[one_class == which][:count]
        hidden[kept] = labels[kept]
    return hidden


def _order(n: int, seed: int) -> Int[np.ndarray, " n"]:
    """The rows in an order of their own: not that of any epoch, and of every version of numpy."""
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0, 0))).random_raw(n)
    return np.argsort(bits, kind="stable")
