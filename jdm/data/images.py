"""Images: arrays of decoded ones, gathered by row, and the file that a decoded split is kept in.

A split is decoded once; from then on its file is mapped into memory, by every process that reads
it. What is too large for that stays encoded until its rows are asked for.
"""

import itertools
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from jdm.data import DataError
from jdm.data.decoding import decode, decoders

BLOCK = 64  # images that are handed to a decoder at once


@runtime_checkable
class Records(Protocol):
    """Encoded images and their labels: {"image": bytes, "label": int or an array [K]}."""

    path: Path

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class Encoded:
    """A split whose images are decoded when they are asked for, as one array [N, S, S, C].

    records: opens them; called once in every process, so that worker processes can be given this.
    Their `__getitems__` takes a list of rows.
    """

    def __init__(self, records: Callable[[], Any], count: int, size: int, channels: int):
        self._records, self._open = records, None
        self.shape = (count, size, size, channels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> UInt8[np.ndarray, "n h w c"]:
        if self._open is None:
            self._open = self._records()
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for i, one in enumerate(self._open.__getitems__(rows.tolist())):
            out[i] = decode(one["image"], *self.shape[2:])
        return out

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": None}


class Joined:
    """Rows of one or more splits, as one array [N, S, S, C] that is gathered when asked.

    parts: (an array or Encoded, which of its rows), one after the other.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray | Encoded, np.ndarray]]):
        # Of a mapped array the plain view: rows of it are gathered in less time.
        self._parts = [
            (images if isinstance(images, Encoded) else np.asarray(images), kept)
            for images, kept in parts
        ]
        self._ends = np.cumsum([len(kept) for _, kept in parts])
        self.shape = (int(self._ends[-1]), *parts[0][0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> UInt8[np.ndarray, "n h w c"]:
        if len(self._parts) == 1:  # gathered once, not copied again
            images, kept = self._parts[0]
            return images[kept[rows]]
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        part = np.searchsorted(self._ends, rows, side="right")
        for i, (images, kept) in enumerate(self._parts):
            here = part == i
            if here.any():
                out[here] = images[kept[rows[here] - (self._ends[i] - len(kept))]]
        return out


def kept_labels(folder: Path, records: Records) -> Int[np.ndarray, "n ..."]:
    """The labels of a split, from the file in `folder`, made if need be."""
    if not folder.exists():
        _write(folder, records, None)
    return _read(folder / "labels.npy", len(records))


def decoded(
    folder: Path, records: Records, size: int, channels: int
) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, "n ..."]]:
    """All images of a split, read-only and mapped from a file in `folder`, and their labels.

    records: what is decoded where the folder is not there yet; several processes may do so at once.

    Raises DataError where there is no room, for an image that cannot be decoded, and for a file in
    the folder that is damaged.
    """
    shape = (len(records), size, size, channels)
    if not folder.exists():
        _write(folder, records, shape)
    images = _read(folder / "images.npy", len(records), mmap_mode="r")
    if images.shape != shape or images.dtype != np.uint8:
        raise DataError(f"{folder} holds images {images.shape} instead of {shape}: delete it")
    return images, _read(folder / "labels.npy", len(records))


def _read(path: Path, count: int, **options) -> np.ndarray:
    try:
        found = np.load(path, **options)
        if len(found) != count:
            raise ValueError(f"{len(found)} rows instead of {count}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {path.parent}") from error
    return found


def _write(folder: Path, records: Records, shape: tuple[int, ...] | None) -> None:
    """Labels, and images of a shape, into a folder beside, which gets its name when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(np.prod(shape or 0)), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"decoded, the images take {needed / 2**20:,.0f} MiB, but {folder.parent} has room for "
            f"{free / 2**20:,.0f} MiB; data.cache_dir names another folder"
        )
    making = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")  # of any host
    making.mkdir()
    try:
        labels = _write_images(making / "images.npy", records, shape) if shape else None
        labels = np.stack(labels or [one["label"] for one in records])
        np.save(making / "labels.npy", labels)
        try:
            making.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has made the same a moment earlier
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write_images(path: Path, records: Records, shape: tuple[int, ...]) -> list:
    """Decodes all records; returns their labels. Raises DataError for one that cannot be."""
    labels, written, numbered = [], 0, iter(records)
    # Written, not mapped: where a disk is full, writing raises and a mapping kills.
    with (
        open(path, "wb") as file,
        decoders(len(records)) as decode_ahead,
        # No bar where there is no terminal.
        tqdm(total=len(records), desc="decoding", unit=" images", disable=None) as progress,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

        def blocks():
            while block := list(itertools.islice(numbered, BLOCK)):
                labels.extend(one["label"] for one in block)
                yield [one["image"] for one in block], *shape[2:]

        for pixels, why in decode_ahead(blocks()):
            file.writelines(pixels)
            written += len(pixels)
            progress.update(len(pixels))
            if why:
                raise DataError(f"{records.path}: image {written} cannot be decoded ({why})")
    return labels
