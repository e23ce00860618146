"""From images and labels to batches of numpy arrays on this host.

Owns the order of training batches, reading ahead, and the padding of evaluation batches. Knows
nothing of devices: uint8 pixels become floats on the device, and augmentation happens there too.

A batch is rows of the images, gathered at once. Training reads the endless sequence

    perm(seed, 0) ++ perm(seed, 1) ++ perm(seed, 2) ++ ...      perm(seed, e): epoch e of N rows

Global batch b of B rows is positions [b·B, (b + 1)·B) of it, across epoch ends, so every batch is
full and every image comes once per epoch. Host h of H takes the contiguous positions
b·B + [h·B/H, (h + 1)·B/H). What comes next depends on (seed, B, b) alone, so the number b is the
whole position of a training run, and holds for another number of hosts too.
"""

import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jdm.data import DataError
from jdm.data.images import Encoded, Joined

Batch = dict[str, np.ndarray]
Images = UInt8[np.ndarray, "n h w c"] | Encoded | Joined

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
        self._images, self._labels, self.images = images, labels, len(images)
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


class TrainBatches:
    """An endless iterator of batches that knows its position; see `train_batches`.

    source: random access to this host's rows of every batch. workers: processes that read them;
    0 is a thread of this one.
    """

    def __init__(self, source: _HostBatches, workers: int):
        self._source, self._workers = source, workers
        self._close = lambda: None
        self.set_state({"next_index": 0})

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """How many batches were handed out, and of how many images, as JSON can hold it."""
        return {"next_index": self._next, "images": self._source.images}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position: the next batch is the one that came next at `get_state`.

        Raises DataError where that was another number of images: the order would be another.
        """
        before, now = state.get("images", self._source.images), self._source.images
        if before != now:
            raise DataError(f"training began on {before:,} images, and now finds {now:,}")
        import grain  # here: takes about a second, and imports jax for its own use

        self._close()
        self._next = state["next_index"]
        batches = grain.MapDataset.source(self._source)[self._next :]
        # Four batches ahead: grain's default of 500 batches would be the whole memory. Of a worker
        # one thread: two that open the records at once would import TFDS at once, and deadlock.
        threads = 1 if self._workers else 2
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
        batches = batches.to_iter_dataset(reading)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain asks for one of its own, whoever uses it
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options)
        self._ahead = iter(batches)
        # No later than at exit: workers that the interpreter's end overtakes complain. Older
        # versions of grain have nothing to close.
        self._close = weakref.finalize(self, getattr(self._ahead, "close", lambda: None))


def train_batches(
    images: Images,
    labels: Int[np.ndarray, "n ..."],
    *,
    batch_size: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> TrainBatches:
    """Endless shuffled batches {"image": uint8 [B/H, h, w, c], "label": int32 [B/H]} of this host.

    Labels may be [N, K], and are [B/H, K] then.

    images: uint8 [N, h, w, c], an array or what is indexed like one (`jdm.data.images`).
    batch_size: B, over all hosts; may exceed N. seed: the order, the same on every host. host,
    hosts: which rows of each batch are ours, `jax.process_index()` and `jax.process_count()`.
    workers: processes that gather the images, for those that are decoded only then; the batches are
    the same.

    `get_state()` is the number of batches handed out, and of images, as JSON can hold it;
    `set_state` of it on any other such iterator, with any number of hosts or workers, goes on with
    exactly the batch that would have come.

    Raises ValueError for arrays, sizes or hosts that do not fit together.
    """
    _check(images, labels, batch_size, host, hosts)
    if len(images) == 0:
        raise ValueError("There are no images to train on: the split is empty.")
    if seed < 0:
        raise ValueError(f"The seed is {seed}, but must be 0 or more.")
    source = _HostBatches(images, labels, batch_size=batch_size, seed=seed, host=host, hosts=hosts)
    return TrainBatches(source, workers)


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


def _check(images: Images, labels: np.ndarray, batch_size: int, host: int, hosts: int) -> None:
    if len(images) != len(labels):
        raise ValueError(f"There are {len(images)} images but {len(labels)} labels.")
    if hosts < 1 or not 0 <= host < hosts:
        raise ValueError(f"host is {host} of {hosts} hosts, but must be in [0, hosts).")
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"The batch size is {batch_size}, but must be a positive multiple of {hosts}, the "
            "number of hosts."
        )
