"""From the name of a dataset to batches of numpy arrays on this host.

Owns reading a split, the order of training batches and the padding of evaluation batches. Knows
nothing of devices: uint8 pixels become floats on the device, and augmentation happens there too.

A split is decoded once into one uint8 array, and a batch is rows of it. Training reads the endless
sequence

    perm(seed, 0) ++ perm(seed, 1) ++ perm(seed, 2) ++ ...      perm(seed, e): epoch e of N rows

Global batch b of B rows is positions [b·B, (b + 1)·B) of it, across epoch ends, so every batch is
full and every image comes once per epoch. Host h of H takes the contiguous positions
b·B + [h·B/H, (h + 1)·B/H). What comes next depends on (seed, B, b) alone, so the number b is the
whole position of a training run, and holds for another number of hosts too.
"""

import contextlib
import functools
import importlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt8

from jdm.data.datasets import available, dataset

Batch = dict[str, np.ndarray]


class DataError(RuntimeError):
    """Prepared files that cannot be read."""


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator of batches that knows its position."""

    def __iter__(self) -> "BatchIterator": ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as a dict that JSON can hold."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position: the next batch is the one that came next at `get_state`."""


# Reading -----------------------------------------------------------------------------------------


def load_split(
    name: str, split: str, data_dir: str | None = None
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    """A whole split, decoded: images in [0, 255] and labels in [0, num_classes), -1 = unlabelled.

    name, split: a dataset of `jdm.data.datasets` and one of its splits. data_dir: where TFDS keeps
    prepared data; None or "" means $TFDS_DATA_DIR, or else ~/tensorflow_datasets. A dataset that
    is not there yet is prepared first; several processes may do so at once.

    Raises ValueError for an unknown name or split, DataError for files that cannot be read.
    """
    entry = available(name)
    if split not in entry.splits:
        raise ValueError(
            f"data.split is {split!r}, but {name} has only the splits {', '.join(entry.splits)}."
        )
    size = entry.image_size
    images = np.empty((entry.splits[split], size, size, entry.channels), np.uint8)
    labels = np.empty(len(images), np.int32)

    path = _prepare(name, data_dir)
    try:
        records = _open(name, split, data_dir)
        if len(records) != len(images):
            raise ValueError(f"{len(records)} images in {split} instead of {len(images)}")
        for i, record in enumerate(records):
            if record["image"] is None:  # what ArrayRecord makes of a file cut short
                raise ValueError(f"record {i} is empty")
            image, labels[i] = _decode(record["image"]), record["label"]
            if image.shape != images.shape[1:]:  # assigning could broadcast it
                raise ValueError(f"image {i} has shape {image.shape}, not {images.shape[1:]}")
            images[i] = image
        if labels.min() < -1 or labels.max() >= entry.num_classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except Exception as error:  # TFDS, ArrayRecord and PIL share no type for "damaged"
        raise DataError(
            f"The prepared files of {name} in {path} cannot be read ({error}): delete that folder "
            "and they will be made again."
        ) from error
    return images, labels


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds  # here: takes most of a second

    importlib.import_module(dataset(name).module)  # registers the builder
    # TFDS expands a ~ in some places only, and would leave a folder of that name behind.
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    return tfds.builder(name, data_dir=data_dir, file_format="array_record")


def _prepare(name: str, data_dir: str | None) -> str:
    """Prepares the dataset unless it is there; returns its folder."""
    builder = _builder(name, data_dir)
    if not builder.data_path.exists():
        print(f"Preparing {name} in {builder.data_path}.", file=sys.stderr)
        try:
            with (  # TFDS's own bars and announcements; absl's log is not affected
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                builder.download_and_prepare()
        except OSError:
            # TFDS writes beside and renames. If the folder is there now, another process has
            # renamed its own, equal one a moment earlier.
            if not builder.data_path.exists():
                raise
    return str(builder.data_path)


def _open(name: str, split: str, data_dir: str | None) -> Any:
    """The records of a prepared split: {"image": encoded bytes, "label": int}."""
    import tensorflow_datasets as tfds

    # A new builder: the one that prepared may have lost the race, and knows no splits then.
    return _builder(name, data_dir).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )


def _decode(encoded: bytes) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of an encoded image. (TFDS would take OpenCV where there is one, and warn if not.)"""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.atleast_3d(np.asarray(image))


# Training ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a batch is within one epoch, or crosses into the next
def epoch_permutation(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order of n rows in an epoch, a pure function of its arguments; read-only."""
    # spawn_key keeps (seed, epoch) pairs apart: SeedSequence([2**32 + 5, 0]) is that of [5, 1].
    # Sorting raw bits is a uniform shuffle that every numpy agrees on; numpy reserves the right to
    # change Generator.permutation, and saved positions must outlive that.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    order = np.argsort(bits, kind="stable")
    order.setflags(write=False)  # the cache hands the same array to everyone
    return order


def endless_rows(n: int, seed: int, start: int, stop: int) -> Int[np.ndarray, " m"]:
    """Positions [start, stop) of perm(seed, 0) ++ perm(seed, 1) ++ ..., as rows in [0, n)."""
    parts = []
    while start < stop:
        epoch, offset = divmod(start, n)
        parts.append(epoch_permutation(n, seed, epoch)[offset : offset + stop - start])
        start += len(parts[-1])
    return np.concatenate(parts)


class _HostBatches:
    """Random access to this host's rows of every global batch: the source under grain."""

    def __init__(self, images, labels, *, batch_size: int, seed: int, host: int, hosts: int):
        self._images, self._labels = images, labels
        self._batch_size, self._seed = batch_size, seed
        self._rows = batch_size // hosts
        self._first = host * self._rows

    def __len__(self) -> int:
        return sys.maxsize  # endless

    def __getitem__(self, b: int) -> Batch:
        start = b * self._batch_size + self._first
        rows = endless_rows(len(self._images), self._seed, start, start + self._rows)
        return {"image": self._images[rows], "label": self._labels[rows]}

    def __repr__(self) -> str:
        return f"_HostBatches({len(self._images)} images, batch_size={self._batch_size})"


def train_batches(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n ..."],
    *,
    batch_size: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> BatchIterator:
    """Endless shuffled batches {"image": uint8 [B/H, h, w, c], "label": int32 [B/H]} of this host.

    Labels may be [N, K], and are [B/H, K] then.

    batch_size: B, over all hosts; may exceed n. seed: the order, the same on every host. host,
    hosts: which rows of each batch are ours, `jax.process_index()` and `jax.process_count()`.

    `get_state()` is the number of batches handed out, in a dict that JSON can hold; `set_state` of
    it on any other such iterator goes on with exactly the batch that would have come.

    Raises ValueError for arrays, sizes or hosts that do not fit together.
    """
    _check(images, labels, batch_size, host, hosts)
    if len(images) == 0:
        raise ValueError("There are no images to train on: the split is empty.")
    if seed < 0:
        raise ValueError(f"The seed is {seed}, but must be 0 or more.")

    import grain  # here: takes about a second, and imports jax for its own use

    batches = grain.MapDataset.source(
        _HostBatches(images, labels, batch_size=batch_size, seed=seed, host=host, hosts=hosts)
    )
    # One thread, two batches ahead: grain's default of 500 batches would be the whole memory.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.to_iter_dataset(ahead))


# Evaluation --------------------------------------------------------------------------------------


def eval_batches(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n ..."],
    batch_size: int,
    *,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Every image once, in order, in batches of one shape: {"image", "label", "mask" bool [B/H]}.

    batch_size, host, hosts: as in `train_batches`. The last batch is padded with black images
    labelled -1, where mask is False; every host gets the same number of batches.

    Raises ValueError for arrays, sizes or hosts that do not fit together.
    """
    _check(images, labels, batch_size, host, hosts)
    rows = batch_size // hosts

    def batches() -> Iterator[Batch]:  # apart, so that the checks do not wait for the first next()
        for start in range(0, len(images), batch_size):
            ours = slice(start + host * rows, start + (host + 1) * rows)
            image, label = images[ours], labels[ours]
            pad = rows - len(image)
            yield {
                "image": np.pad(image, ((0, pad), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(
                    label, ((0, pad), *[(0, 0)] * (label.ndim - 1)), constant_values=-1
                ),
                "mask": np.arange(rows) < len(image),
            }

    return batches()


def _check(images: np.ndarray, labels: np.ndarray, batch_size: int, host: int, hosts: int) -> None:
    if len(images) != len(labels):
        raise ValueError(f"There are {len(images)} images but {len(labels)} labels.")
    if hosts < 1 or not 0 <= host < hosts:
        raise ValueError(f"host is {host} of {hosts} hosts, but must be in [0, hosts).")
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"The batch size is {batch_size}, but must be a positive multiple of {hosts}, the "
            "number of hosts."
        )
