"""Arrays of images that are indexed by rows, and the files that keep a decoded split.

A split is decoded once, to a file. Every process that reads the split maps this file into memory.
Where the decoded images would be too large, they stay encoded, and rows are decoded when indexed.
"""

import itertools
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from jdm.data import DataError
from jdm.data.decoding import decode, decoders
from jdm.data.labels import Labels, Rows
from jdm.files import whole_folder
from jdm.messages import STDERR

Pixels = UInt8[np.ndarray, "n h w c"]
BLOCK = 64  # images that are handed to a decoder at once


@runtime_checkable
class RecordSource(Protocol):
    """Encoded images and their labels: {"image": bytes, "label": int or an array [K]}, and "file",
    the name of the file that an image came from, where it is known."""

    path: Path

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class EncodedImages:
    """A split as an array [N, S, S, C] whose rows are decoded each time they are indexed.

    open_records: returns the records, whose `__getitems__` takes a list of rows. Each process calls
    it once, since open records cannot be sent to worker processes.
    """

    def __init__(self, open_records: Callable[[], Any], count: int, size: int, channels: int):
        self._open_records = open_records
        self._records: Any = None
        self.shape = (count, size, size, channels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> Pixels:
        if self._records is None:
            self._records = self._open_records()
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for i, one in enumerate(self._records.__getitems__(rows.tolist())):
            try:
                out[i] = decode(one["image"], *self.shape[2:])
            except Exception as error:  # PIL has no type for "broken"
                raise _broken(self._records, one, int(rows[i]), str(error)) from error
        return out

    def __getstate__(self) -> dict:
        return {**vars(self), "_records": None}


Images = Pixels | EncodedImages


class Selection:
    """Rows of one or more splits, one after the other, as an array [N, S, S, C]; copies no image.

    parts: (images of a split, the rows to take from it).
    """

    def __init__(self, parts: Sequence[tuple[Images, Rows]]):
        # np.asarray, because rows of an np.memmap are gathered more slowly.
        self._parts = [
            (images if isinstance(images, EncodedImages) else np.asarray(images), kept)
            for images, kept in parts
        ]
        self._ends = np.cumsum([len(kept) for _, kept in parts])
        self.shape = (int(self._ends[-1]), *parts[0][0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> Pixels:
        if len(self._parts) == 1:  # saves a copy
            images, kept = self._parts[0]
            return images[kept[rows]]
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        part = np.searchsorted(self._ends, rows, side="right")
        for i, (images, kept) in enumerate(self._parts):
            here = part == i
            if here.any():
                out[here] = images[kept[rows[here] - (self._ends[i] - len(kept))]]
        return out


def labels_of(folder: Path, records: RecordSource) -> Labels:
    """The labels of a split, from a file in `folder`, which is written first if it is missing."""
    if not folder.exists():
        _write(folder, records, None)
    return _read(folder / "labels.npy", (len(records),))


def decoded_split(
    folder: Path, records: RecordSource, size: int, channels: int
) -> tuple[Pixels, Labels]:
    """(images, labels) of a split; the images are read-only and mapped from a file in `folder`.

    If the folder is missing, the records are decoded; several processes may do so at once.

    Raises DataError for a disk without room, an image that cannot be decoded, and a damaged file.
    """
    shape = (len(records), size, size, channels)
    if not folder.exists():
        _write(folder, records, shape)
    images = _read(folder / "images.npy", shape, mmap_mode="r")
    return images, _read(folder / "labels.npy", shape[:1])


def _read(path: Path, shape: tuple[int, ...], **options) -> np.ndarray:
    """The array in a file, whose shape must begin with `shape`."""
    try:
        found = np.load(path, **options)
        if found.shape[: len(shape)] != shape:
            raise ValueError(f"its shape is {found.shape} instead of {shape}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {path.parent}") from error
    return found


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def check_room(folder: Path, needed: int, what: str, option: str) -> None:
    """Raises DataError where the disk of `folder` has no room for the `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        room = f"{folder} has room for {mebibytes(free)}; {option} chooses another folder"
        raise DataError(f"{what} takes about {mebibytes(needed)}, but {room}")


def _write(folder: Path, records: RecordSource, shape: tuple[int, ...] | None) -> None:
    """Writes the labels, and the images where a shape is given, completely or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = int(np.prod(shape or 0))
    check_room(folder.parent, needed, "decoding the images", "config.data.cache_dir")
    try:
        with whole_folder(folder, f"{uuid.uuid4().hex[:8]}.part") as unfinished:
            if shape:
                labels = _write_images(unfinished / "images.npy", records, shape)
            else:
                labels = [one["label"] for one in records]
            np.save(unfinished / "labels.npy", np.stack(labels))
    except OSError:
        if not folder.exists():  # otherwise another process has written the same files
            raise


def _write_images(path: Path, records: RecordSource, shape: tuple[int, ...]) -> list:
    """Decodes all records and returns their labels. Raises DataError for a broken image."""
    labels: list[np.ndarray] = []
    written, remaining = 0, iter(records)
    # On a full disk, writing to a file raises an error; writing to a mapped file kills the process.
    with (
        open(path, "wb") as file,
        decoders(len(records)) as decode_ahead,
        # disable=None hides the bar where there is no terminal.
        tqdm(
            total=len(records), desc="decoding", unit=" images", file=STDERR, disable=None
        ) as progress,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

        def blocks():
            while block := list(itertools.islice(remaining, BLOCK)):
                labels.extend(one["label"] for one in block)
                yield [one["image"] for one in block], *shape[2:]

        for pixels, why in decode_ahead(blocks()):
            file.writelines(pixels)
            written += len(pixels)
            progress.update(len(pixels))
            if why:
                one = next(itertools.islice(iter(records), written, None))
                raise _broken(records, one, written, why)
    return labels


def _broken(records: RecordSource, one: dict[str, Any], row: int, why: str) -> DataError:
    """The error for a record that cannot be decoded, with the name of its file, where it has one.

    Files are checked before they become records, by the same steps: this one was not, or by an
    older version.
    """
    problem = f"{records.path}: image {row} cannot be decoded ({why})"
    if file := one.get("file"):
        again = f"delete {records.path} and prepare the folder again with --skip-broken"
        problem = f"{problem}, from the file {file}: {again}"
    return DataError(problem)
