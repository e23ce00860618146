"""From the name of a data set to arrays: a split for evaluation, or the images of a training run.

Owns which images belong to a split, and which images and labels a run sees. Both are fixed before
there are batches or hosts, in these steps; random draws depend on the seed alone:

    records -> the split, which may be held out of train -> selected classes -> limit
    -> hidden labels -> images of a second data set, without labels
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jdm.data.datasets import Dataset
from jdm.data.decoding import VERSION
from jdm.data.images import EncodedImages, Images, Pixels, Selection, decoded_split, labels_of
from jdm.data.labels import Labels, Mask, Rows, draw_rows, hide_labels
from jdm.data.lookup import dataset
from jdm.data.records import Records, data_root
from jdm.errors import NO_VALUE, InvalidValue
from jdm.files import local_path, one_at_a_time
from jdm.messages import say

DECODED = "jdm_decoded"  # the folder of decoded images, beside the prepared data sets
HELD_OUT_SEED = 20_230_918  # of the draw of held-out images, which is the same in every run


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A split of a data set; unpacks to (images, labels).

    images: uint8 [N, H, W, C], in memory or mapped from a file. labels: int32 [N] in [0, K), or
    int8 [N, K] of 0 and 1 for K attributes; -1 is unlabelled. name: such as "test", for errors.
    """

    images: Pixels
    labels: Labels
    name: str = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.images, self.labels))


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How a data set is read.

    data_dir: where TFDS keeps prepared data; "" is $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    size, channels: what images are converted to; None is the default of the data set. classes: the
    classes to keep, in the order of their new labels; () is all. validation: the share of "train"
    that is held out as "validation", where the data set has no such split. cache_dir: where decoded
    images are kept; "" is a folder beside the prepared data. workers: 0 keeps decoded images on
    disk; with 1 or more, images are decoded each time they are read.
    """

    data_dir: str = ""
    size: int | None = None
    channels: int | None = None
    classes: Sequence[int] = ()
    validation: float = 0.0
    cache_dir: str = ""
    workers: int = 0

    @classmethod
    def of(cls, data: ConfigDict, model: ConfigDict) -> "ReadOptions":
        """How a run with these sections of a config reads its data sets."""
        same = {key: data[key] for key in ("classes", "validation", "cache_dir", "workers")}
        return cls(data.dir, model.image_size, model.image_channels, **same)


def load_split(name: str, split: str, options: ReadOptions = ReadOptions()) -> Split:
    """A whole split of a data set, decoded.

    name: see `lookup.dataset`. split: one of the splits in `split_names`.

    Raises InvalidValue for an unknown name, split or class, and DataError for files that are
    missing or cannot be read.
    """
    known = split_names(dataset(name), options.validation)
    if split not in known:
        raise InvalidValue("split", split, f"is unknown; {name} has {', '.join(known)}")
    images, labels, rows = _select(name, split, options)
    if isinstance(images, np.ndarray) and len(rows) == len(images):
        return Split(images, labels, split)
    return Split(images[rows], labels[rows], split)


def training_set(
    name: str,
    options: ReadOptions,
    *,
    seed: int,
    limit: int = 0,
    labelled_fraction: float = 1.0,
    labelled_per_class: int = 0,
    unlabelled: str = "",
) -> tuple[Selection, Labels]:
    """(images, labels) that a run trains on; the labels are as in `Split`.

    seed: of the draws. limit: the largest number of images, of each class in proportion; 0 is all.
    labelled_fraction, labelled_per_class: see `hide_labels`. unlabelled: a second data set, whose
    split "train" is added with all labels -1.

    Raises InvalidValue, about the config key, and DataError as `load_split` does.
    """
    images, labels, rows = _select(name, "train", options)
    if 0 < limit < len(rows):
        candidates = np.isin(np.arange(len(labels)), rows)
        rows = np.sort(draw_rows(labels, limit, seed, candidates))
    labels = hide_labels(labels[rows], labelled_fraction, labelled_per_class, seed)
    parts = [(images, rows)]
    if unlabelled:
        images, _, rows = _select(unlabelled, "train", dataclasses.replace(options, classes=()))
        parts.append((images, rows))
        hidden = np.full((len(rows), *labels.shape[1:]), -1, labels.dtype)
        labels = np.concatenate([labels, hidden])
    return Selection(parts), labels


def _select(name: str, split: str, options: ReadOptions) -> tuple[Images, Labels, Rows]:
    """(images, labels, rows): all that is stored together, and the rows that are in the split."""
    facts = dataset(name)
    images, labels = whole_split(facts, split, options)
    rows = split_rows(facts, split, labels, options.validation)
    kept, labels = keep_classes(labels, options.classes, facts)
    return images, labels, rows[kept[rows]]


def split_names(facts: Dataset, validation: float) -> tuple[str, ...]:
    """The splits that can be read. validation: the share of "train" that is held out."""
    held_out = {"validation": 0} if validation > 0 else {}
    return tuple({**facts.splits, **held_out})


def split_rows(facts: Dataset, split: str, labels: Labels, validation: float) -> Rows:
    """The rows of a split in ascending order. labels: of the stored split that contains it."""
    if split in facts.from_train or (split == "train" and facts.from_train):
        counts = {name: facts.splits[name] for name in facts.from_train}
    elif "validation" not in facts.splits and split in ("train", "validation"):
        counts = {"validation": max(round(validation * len(labels)), int(validation > 0))}
    else:
        return np.arange(len(labels))
    left = np.ones(len(labels), bool)
    for name, count in counts.items():
        rows = np.sort(draw_rows(labels, count, HELD_OUT_SEED, left))
        if name == split:
            return rows
        left[rows] = False
    return np.flatnonzero(left)


def check_classes(classes: Sequence[int], facts: Dataset) -> None:
    """Raises InvalidValue for a class that the data set does not have, or that is named twice."""
    for one in classes:
        if not 0 <= one < facts.num_classes or list(classes).count(one) > 1:
            known = f"from 0 to {facts.num_classes - 1}, the classes of {facts.name}"
            allowed = f"must be different numbers {known}"
            raise InvalidValue("config.data.classes", tuple(classes), allowed)


def keep_classes(labels: Labels, classes: Sequence[int], facts: Dataset) -> tuple[Mask, Labels]:
    """(rows to keep, new labels of all rows): classes[k] gets the label k; () keeps all labels.

    Unlabelled rows are kept. Of labels [N, K], every row is kept, with the columns `classes`.

    Raises InvalidValue as `check_classes` does.
    """
    check_classes(classes, facts)
    if not classes or labels.ndim > 1:
        return np.ones(len(labels), bool), labels[:, list(classes)] if classes else labels
    renumbered = np.full(facts.num_classes + 1, -1, np.int32)  # the last entry is for the label -1
    renumbered[list(classes)] = np.arange(len(classes))
    new = renumbered[labels]
    return (new >= 0) | (labels < 0), new


def stored_split(facts: Dataset, split: str) -> str:
    """The split that contains this one in the records."""
    return "train" if split in facts.from_train or split not in facts.splits else split


def whole_split(facts: Dataset, split: str, options: ReadOptions) -> tuple[Images, Labels]:
    """(images, labels) of the stored split that contains a split; decodes it the first time.

    Raises InvalidValue where neither options nor facts have the size or the channels.
    """
    stored = stored_split(facts, split)
    records = Records(facts, stored, options.data_dir)
    size = options.size or (facts.sizes or (0,))[0]
    channels = options.channels or facts.channels
    if not size or not channels:
        allowed = f"and channels must be given: the images of {facts.name} may have any size"
        raise InvalidValue("size", NO_VALUE, allowed)
    if options.workers:
        reopen = functools.partial(Records, facts, stored, options.data_dir)
        images = EncodedImages(reopen, len(records), size, channels)
        return images, labels_of(cache_folder(records, stored, options, "labels"), records)
    folder = cache_folder(records, stored, options, f"{size}x{size}x{channels}-v{VERSION}")
    waits = functools.partial(say, f"waiting for another process, which decodes {facts.name}")
    with one_at_a_time(folder, waits) if not folder.exists() else contextlib.nullcontext():
        if not folder.exists():  # otherwise another process has decoded it meanwhile
            say(f"Decoding {len(records):,} images of {facts.name} to {folder}.")
        return decoded_split(folder, records, size, channels)


def cache_folder(records: Records, stored: str, options: ReadOptions, what: str) -> Path:
    """The folder that keeps what was computed from the records of a stored split."""
    prefix = "-".join([*records.path.relative_to(records.root).parts, stored])
    return cache_root(options) / f"{prefix}-{what}-{records.fingerprint(stored)}"


def cache_root(options: ReadOptions) -> Path:
    """The folder that keeps what is computed from data sets, such as decoded images."""
    if options.cache_dir:
        return Path(local_path("config.data.cache_dir", options.cache_dir))
    return Path(data_root(options.data_dir), DECODED)
