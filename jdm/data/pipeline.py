"""From images and labels to batches of numpy arrays on this host.

Owns the order of training batches, reading ahead, and the padding of evaluation batches. Knows
nothing about devices: conversion to float and augmentation happen in the training step. Training
reads the endless sequence of rows

    perm(seed, 0) ++ perm(seed, 1) ++ perm(seed, 2) ++ ...     perm(seed, e): the N rows in epoch e

Global batch b of B rows is positions [b·B, (b + 1)·B) of the sequence, across epoch ends, so every
batch is full and every image occurs once per epoch. Host h of H takes the contiguous positions
b·B + [h·B/H, (h + 1)·B/H). Batch b depends only on the seed and B, so the number b is the complete
position of a training run, and is valid for any number of hosts.
"""

import ast
import contextlib
import functools
import linecache
import multiprocessing.resource_tracker
import signal
import sys
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int

from jdm.data import DataError
from jdm.data.images import Images, Selection
from jdm.data.labels import Labels, random_order
from jdm.errors import InvalidValue

Batch = dict[str, np.ndarray]
PixelSource = Images | Selection


@functools.lru_cache(maxsize=2)  # most batches lie in one epoch or in two
def epoch_permutation(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order of n rows in an epoch. Read-only."""
    order = random_order(n, seed, epoch)
    order.setflags(write=False)  # the cache returns the same array every time
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
    """A data source of grain: item b is this host's part of global batch b."""

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


class TrainBatches(Iterator[Batch]):
    """An endless iterator of batches whose position can be saved and restored.

    workers: the number of processes that read batches ahead; 0 uses threads of this process.
    """

    def __init__(self, source: _HostBatches, workers: int):
        self._source, self._workers = source, workers
        self._close = lambda: None
        self.set_state({"next_index": 0})

    def __next__(self) -> Batch:
        with _sigterm_blocked() if self._workers else contextlib.nullcontext():
            batch = next(self._ahead)  # the first starts the workers
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, ready for JSON: the number of batches so far, and the number of images."""
        return {"next_index": self._next, "images": self._source.images}

    def set_state(self, state: dict[str, Any], *, other_data: bool = False) -> None:
        """Moves to a position from `get_state`, so that the same batches follow again.

        other_data: accept another number of images, whose order is a new one.

        Raises DataError if the number of images has changed, because the order would differ.
        """
        before, now = state.get("images", self._source.images), self._source.images
        if before != now and not other_data:
            raise DataError(f"training began on {before:,} images, but there are {now:,} now")
        import grain  # takes about a second, and imports JAX

        self._close()
        self._next = state["next_index"]
        batches = grain.MapDataset.source(self._source)[self._next :]
        # grain reads 500 batches ahead by default, which could fill the memory. A worker has one
        # thread, because two would import TFDS at the same time, which deadlocks.
        reading = grain.ReadOptions(num_threads=1 if self._workers else 2, prefetch_buffer_size=4)
        batches = batches.to_iter_dataset(reading)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads a flag, which absl.app would parse
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options)
        self._ahead = iter(batches)
        # Closed at exit at the latest: workers print errors when the interpreter ends before them.
        # Older versions of grain have no `close`.
        self._close = weakref.finalize(self, getattr(self._ahead, "close", lambda: None))


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Blocks SIGTERM in this thread, and in each process that it starts, until that one ends.

    Clusters send SIGTERM to all processes of a job; the run goes on to its next checkpoint, and
    ends its workers itself. A worker that ignored it only once it runs could be ended while it
    starts. Of this process, any other thread may take the signal meanwhile.
    """
    multiprocessing.resource_tracker.ensure_running()  # starting it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_main_guard(workers: int) -> None:
    """Raises InvalidValue where each worker would run the user's script, and train, again.

    A process that multiprocessing starts imports the script that was started. So a script has to
    start workers under `if __name__ == "__main__":`. Whether it does shows in its source, at the
    statement of its top level that is running.
    """
    main = sys.modules["__main__"]
    running = [
        frame.f_lineno
        for frame, _ in traceback.walk_stack(sys._getframe())
        if frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"
    ]
    module = getattr(main.__spec__, "name", "")
    imported = not module.endswith("__main__")  # python -m package: workers do not run it again
    source = "".join(linecache.getlines(getattr(main, "__file__", None) or ""))
    if not (workers and running and imported and source):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            if node.lineno <= running[-1] <= (node.end_lineno or 0):
                return
    allowed = f"starts processes that run {main.__file__} again"
    hint = 'in this script, put what trains under the line: if __name__ == "__main__":'
    raise InvalidValue("config.data.workers", workers, allowed, hint)


def train_batches(
    images: PixelSource,
    labels: Labels,
    *,
    batch_size: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> TrainBatches:
    """Endless shuffled batches {"image": uint8 [B/H, h, w, c], "label": int [B/H, ...]} of a host.

    images: [N, h, w, c] in [0, 255], N > 0. labels: [N] or [N, K]. batch_size: B, over all hosts;
    may exceed N. seed: 0 or more, of the order; the same on every host. host, hosts: h and H, see
    jdm.distributed. workers: the number of processes that read
    batches ahead, for images that are decoded when they are read; the batches are the same.

    A saved position can be restored with any number of hosts and workers.

    Raises ValueError for arrays, sizes or hosts that do not fit together.
    """
    _check(images, labels, batch_size, host, hosts)
    source = _HostBatches(images, labels, batch_size=batch_size, seed=seed, host=host, hosts=hosts)
    return TrainBatches(source, workers)


def _check(images: PixelSource, labels: Labels, batch_size: int, host: int, hosts: int) -> None:
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images but {len(labels)} labels")
    if hosts < 1 or not 0 <= host < hosts:
        raise ValueError(f"host is {host} of {hosts} hosts, but must be in [0, hosts)")
    if batch_size < 1 or batch_size % hosts:
        allowed = f"a positive multiple of {hosts}, the number of hosts"
        raise ValueError(f"batch_size is {batch_size}, but must be {allowed}")
