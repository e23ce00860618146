"""Random draws of rows, and hidden labels: training as if only some of the images had labels.

Rows are drawn once, from the whole split, before there are batches or hosts. A draw depends on the
seed alone, and not on earlier draws.
"""

import numpy as np
from jaxtyping import Bool, Int

from jdm.errors import InvalidValue

Labels = Int[np.ndarray, "n ..."]  # [N] of classes or [N, K] of attributes; -1 is unlabelled
Mask = Bool[np.ndarray, " n"]
Rows = Int[np.ndarray, " _"]  # indices


def random_order(n: int, seed: int, *stream: int) -> Int[np.ndarray, " n"]:
    """A uniform permutation of n rows, which depends on the arguments alone.

    stream: numbers that make draws with the same seed independent.
    """
    # spawn_key keeps the two apart: SeedSequence([2**32 + 5, 0]) equals SeedSequence([5, 1]).
    # Raw bits are the same in every version of numpy; Generator.permutation may change, which would
    # invalidate saved runs.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    return np.argsort(bits, kind="stable")


def hide_labels(labels: Labels, fraction: float, per_class: int, seed: int) -> Labels:
    """The labels, with all but some of them replaced by -1.

    labels: [N], or [N, K], whose rows are kept or hidden as a whole; -1 is unlabelled and not
    counted. fraction: in (0, 1], of the labels to keep, the same in each class. per_class: the
    number of labels to keep in each class, instead of a fraction, for labels [N]; 0 is unused.

    Raises InvalidValue, about the config key, for a fraction that leaves no label, and for a
    per_class above the size of a class.
    """
    known: Mask = np.any(labels.reshape(len(labels), -1) >= 0, axis=1)
    total, shares = round(fraction * known.sum()), None
    if per_class:
        classes, counts = np.unique(labels[known], return_counts=True)
        if per_class > counts.min():
            fewest = f"is more than the {counts.min()} images of class {classes[counts.argmin()]}"
            raise InvalidValue("config.data.labelled_per_class", per_class, fewest)
        total, shares = per_class * len(classes), np.full(len(classes), per_class)
    elif total == 0 < known.sum():
        none = f"of {known.sum()} labels leaves none"
        raise InvalidValue("config.data.labelled_fraction", fraction, none)
    kept = draw_rows(labels, total, seed, known, shares)
    hidden = np.full_like(labels, -1)
    hidden[kept] = labels[kept]
    return hidden


def draw_rows(
    labels: Labels, total: int, seed: int, candidates: Mask, shares: np.ndarray | None = None
) -> Rows:
    """Draws `total` of the candidate rows, with each class in proportion, to the nearest row.

    Labels [N, K] have no classes: every candidate is equally likely. shares: the number of rows to
    draw from each class that the candidates have, in ascending order, instead of in proportion.
    """
    order = random_order(len(labels), seed, 0, 0)
    rows = order[candidates[order]]
    one_class = labels[rows] if labels.ndim == 1 else np.zeros(len(rows), int)
    classes, counts = np.unique(one_class, return_counts=True)
    shares = counts * (total / max(1, len(rows))) if shares is None else shares
    keep = np.floor(shares).astype(int)
    largest_remainders = np.argsort(keep - shares, kind="stable")
    keep[largest_remainders[: total - keep.sum()]] += 1
    parts = [rows[one_class == one][:count] for one, count in zip(classes, keep, strict=True)]
    return np.concatenate([np.empty(0, int), *parts])
