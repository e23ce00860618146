"""Draws of rows, and hidden labels: training as if only a share of the images had been labelled.

Owns which rows are drawn, and which labels stay. It is settled once, on the whole split and by the
seed alone, before there are batches or hosts: no order of calls can change it.
"""

import numpy as np
from jaxtyping import Bool, Int


def hide_labels(
    labels: Int[np.ndarray, "n ..."], fraction: float, per_class: int, seed: int
) -> Int[np.ndarray, "n ..."]:
    """The same labels with all but some of them replaced by -1.

    labels: of one class each [N], or of several [N, K], which are kept or hidden row by row; those
    that are -1 already stay so, and count for nothing. fraction: in (0, 1], of all labels, and of
    each class as nearly as whole labels allow. per_class: so many of each class instead; 0 is none
    of that. seed: which ones.

    Raises ValueError, naming the config's key, for a fraction out of range or beside per_class, for
    one that leaves no label, and for more than a class has.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data.labelled_fraction={fraction} must be above 0 and at most 1")
    if per_class and fraction < 1:
        raise ValueError(
            f"data.labelled_per_class={per_class} does not go with "
            f"data.labelled_fraction={fraction}; one of them is enough"
        )
    if per_class and labels.ndim > 1:
        raise ValueError(
            f"data.labelled_per_class={per_class} is for one class an image, not for several; "
            "data.labelled_fraction takes both"
        )
    known = (labels >= 0).reshape(len(labels), -1).any(axis=1)
    if per_class:
        classes, counts = np.unique(labels[known], return_counts=True)
        if per_class > counts.min():
            raise ValueError(
                f"data.labelled_per_class={per_class} is more than the {counts.min()} images of "
                f"class {classes[counts.argmin()]}"
            )
        total = per_class * len(classes)
        kept = draw(labels, total, seed, known, shares=np.full(len(classes), per_class))
    else:
        total = round(fraction * known.sum())
        if total == 0 < known.sum():
            raise ValueError(
                f"data.labelled_fraction={fraction} of {known.sum()} labels leaves none"
            )
        kept = draw(labels, total, seed, known)
    hidden = np.full_like(labels, -1)
    hidden[kept] = labels[kept]
    return hidden


def draw(
    labels: Int[np.ndarray, "n ..."],
    total: int,
    seed: int,
    among: Bool[np.ndarray, " n"],
    shares: np.ndarray | None = None,
) -> Int[np.ndarray, " total"]:
    """So many of the rows `among` all, of each class as nearly its share as whole rows allow.

    Of several labels to an image [N, K] the draw is from all alike. shares: of each class that is
    there, in rows; None is in proportion.
    """
    # Raw bits, sorted: every version of numpy agrees on them.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0, 0))).random_raw(len(labels))
    order = np.argsort(bits, kind="stable")
    rows = order[among[order]]
    one_class = labels[rows] if labels.ndim == 1 else np.zeros(len(rows), int)
    classes, counts = np.unique(one_class, return_counts=True)
    shares = counts * (total / max(1, len(rows))) if shares is None else shares
    keep = np.floor(shares).astype(int)
    nearest_to_one_more = np.argsort(keep - shares, kind="stable")
    keep[nearest_to_one_more[: total - keep.sum()]] += 1
    parts = [rows[one_class == one][:count] for one, count in zip(classes, keep, strict=True)]
    return np.concatenate([np.empty(0, int), *parts])
