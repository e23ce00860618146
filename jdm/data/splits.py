"""From the name of a data set to arrays: a split for evaluation, or what a run trains on.

Owns which images belong to a split, and which of them, and of their labels, a run sees. All of it
is settled once, before there are batches or hosts, by the seed where a draw is involved:

    records -> split (carved where the set has none of its own) -> classes -> limit -> hidden
    labels -> images of a second set, all of them unlabelled
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jdm.data.datasets import Dataset, dataset
from jdm.data.decoding import VERSION
from jdm.data.images import Encoded, Joined, decoded, kept_labels
from jdm.data.labels import draw, hide_labels
from jdm.data.records import Records

DECODED = "jdm_decoded"  # the folder of decoded images, beside the prepared sets
CARVED = 20_230_918  # the seed of what is carved: the same images in every run


def load_split(
    name: str,
    split: str,
    data_dir: str = "",
    *,
    size: int | None = None,
    channels: int | None = None,
    classes: Sequence[int] = (),
    validation: float = 0.0,
    cache_dir: str = "",
    workers: int = 0,
) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, "n ..."]]:
    """A whole split, decoded: images in [0, 255] and labels in [0, num_classes), -1 = unlabelled.

    name, split: a data set of `jdm.data.datasets` and one of its splits; "validation" is a share of
    "train", `validation`, where the set has none. data_dir: where TFDS keeps prepared data; "" is
    $TFDS_DATA_DIR, or else ~/tensorflow_datasets. size, channels: what the images are brought to;
    None is what the set has. classes: those that are kept, in the order of their new labels; empty
    is all. cache_dir: of the decoded images; "" is a folder beside the prepared data. workers: if
    above 0, only the images that are asked for are decoded, and none are kept.

    Labels are int32 [N], of a multi-label set int8 [N, K]. The images may be mapped from a file.

    Raises ValueError for an unknown name, split or class, DataError for files that are not there or
    cannot be read.
    """
    facts = dataset(name)
    known = splits_of(facts, validation)
    if split not in known:
        raise ValueError(f"split={split!r} is unknown; {name} has {', '.join(known)}")
    images, labels = whole_split(facts, split, data_dir, size, channels, cache_dir, workers)
    rows = split_rows(facts, split, labels, validation)
    kept, labels = keep_classes(labels, classes, facts)
    rows = rows[kept[rows]]
    if len(rows) == len(images) and not workers:
        return images, labels
    return images[rows], labels[rows]


def training_set(
    name: str,
    data_dir: str,
    *,
    seed: int,
    size: int,
    channels: int,
    classes: Sequence[int] = (),
    limit: int = 0,
    validation: float = 0.0,
    labelled_fraction: float = 1.0,
    labelled_per_class: int = 0,
    unlabelled: str = "",
    cache_dir: str = "",
    workers: int = 0,
) -> tuple[Joined, Int[np.ndarray, "n ..."]]:
    """What a run trains on: images, gathered when asked, and labels, -1 = unlabelled.

    limit: how many images at most, of each class alike; 0 is all. labelled_fraction,
    labelled_per_class: see `hide_labels`. unlabelled: a second data set, whose "train" is added
    without its labels. workers: if above 0, images stay encoded, for so many processes to decode.
    The rest is as in `load_split`.

    Raises ValueError, naming the config's key, and DataError as `load_split` does.
    """
    facts = dataset(name)
    images, labels = whole_split(facts, "train", data_dir, size, channels, cache_dir, workers)
    rows = split_rows(facts, "train", labels, validation)
    kept, labels = keep_classes(labels, classes, facts)
    rows = rows[kept[rows]]
    if 0 < limit < len(rows):
        among = np.zeros(len(labels), bool)
        among[rows] = True
        rows = np.sort(draw(labels, limit, seed, among))
    labels = hide_labels(labels[rows], labelled_fraction, labelled_per_class, seed)
    parts = [(images, rows)]
    if unlabelled:
        others, their_labels = whole_split(
            dataset(unlabelled), "train", data_dir, size, channels, cache_dir, workers
        )
        theirs = split_rows(dataset(unlabelled), "train", their_labels, validation)
        parts.append((others, theirs))
        hidden = np.full((len(theirs), *labels.shape[1:]), -1, labels.dtype)
        labels = np.concatenate([labels, hidden])
    return Joined(parts), labels


def splits_of(facts: Dataset, validation: float) -> tuple[str, ...]:
    """The splits that can be asked for."""
    carves = "validation" not in facts.splits and validation > 0
    return (*facts.splits, *(["validation"] if carves else []))


def split_rows(
    facts: Dataset, split: str, labels: Int[np.ndarray, "n ..."], validation: float
) -> Int[np.ndarray, " m"]:
    """Which of the records that `split` is read from belong to it, in order."""
    if split in facts.carved or (split == "train" and facts.carved):
        shares = {name: facts.splits[name] for name in facts.carved}
    elif "validation" not in facts.splits and split in ("train", "validation"):
        shares = {"validation": max(round(validation * len(labels)), int(validation > 0))}
    else:
        return np.arange(len(labels))
    left = np.ones(len(labels), bool)
    for name, count in shares.items():
        rows = np.sort(draw(labels, count, CARVED, left))
        if name == split:
            return rows
        left[rows] = False
    return np.flatnonzero(left)


def keep_classes(
    labels: Int[np.ndarray, "n ..."], classes: Sequence[int], facts: Dataset
) -> tuple[np.ndarray, Int[np.ndarray, "n ..."]]:
    """(which rows are of the classes, bool [N]; the labels, renumbered in the classes' order).

    Of a multi-label set every row stays, with the labels of these classes alone.

    Raises ValueError for a class that is not there, or is named twice.
    """
    if not classes:
        return np.ones(len(labels), bool), labels
    for one in classes:
        if not 0 <= one < facts.num_classes or list(classes).count(one) > 1:
            raise ValueError(
                f"data.classes={tuple(classes)} must be different numbers from 0 to "
                f"{facts.num_classes - 1}, the classes of {facts.name}"
            )
    if labels.ndim > 1:
        return np.ones(len(labels), bool), labels[:, list(classes)]
    renumbered = np.full(facts.num_classes + 1, -1, np.int32)  # the last one is that of -1
    renumbered[list(classes)] = np.arange(len(classes))
    new = renumbered[labels]
    return (new >= 0) | (labels < 0), new


def stored_split(facts: Dataset, split: str) -> str:
    """The split of the records that a split is read from."""
    return "train" if split in facts.carved or split not in facts.splits else split


def whole_split(
    facts: Dataset,
    split: str,
    data_dir: str,
    size: int | None,
    channels: int | None,
    cache_dir: str = "",
    workers: int = 0,
) -> tuple[np.ndarray | Encoded, np.ndarray]:
    """All records that the split is read from: (images, labels), decoded if need be."""
    stored = stored_split(facts, split)
    records = Records(facts.name, stored, data_dir)
    size = size or (facts.sizes or (0,))[0]
    channels = channels or facts.channels
    if not size or not channels:
        raise ValueError(f"{facts.name} has images of any size; size and channels are needed")
    root = Path(cache_dir).expanduser() if cache_dir else records.root / DECODED
    where = "-".join(records.path.relative_to(records.root).parts)
    if workers:
        folder = root / f"{where}-{stored}-labels-{records.fingerprint(stored)}"
        reopen = functools.partial(Records, facts.name, stored, data_dir)
        return Encoded(reopen, len(records), size, channels), kept_labels(folder, records)
    shape = f"{size}x{size}x{channels}-v{VERSION}"
    folder = root / f"{where}-{stored}-{shape}-{records.fingerprint(stored)}"
    if not folder.exists():
        print(f"Decoding {len(records):,} images of {facts.name} to {folder}.", file=sys.stderr)
    return decoded(folder, records, size, channels)
