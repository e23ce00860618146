"""A folder of one's own images as a data set: a sub-folder for each class.

    /path/cat/1.jpg  /path/dog/2.png                        one split, "train"
    /path/train/cat/1.jpg  /path/test/dog/2.png             the same below each split's name

Owns what is in such a folder. PNG and JPEG, grey or colour, of any size; jdm.data.folder_builder
stores them as they are, and jdm.data.images brings them to one size.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

from jdm.data.datasets import FOLDER, Dataset

ENDINGS = (".png", ".jpg", ".jpeg")
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder held when it was looked at.

    classes: names in the order of the labels, which is that of the alphabet. files: {split: [(path
    below the folder, label)]}. ignored: how many other files there were. total: bytes of all files.
    fingerprint: of their names, sizes and times; another one means other images.
    """

    classes: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    ignored: int
    total: int
    fingerprint: str


def facts(path: str) -> Dataset:
    """The row that the table would have for the folder. Raises ValueError as `listing` does."""
    found = listing(path)
    return Dataset(
        FOLDER + path,
        sizes=(),
        channels=0,
        num_classes=len(found.classes),
        flips=True,
        splits={split: len(files) for split, files in found.files.items()},
        module="jdm.data.folder_builder",
        class_names=found.classes,
    )


@functools.lru_cache(maxsize=4)
def listing(path: str) -> Listing:
    """What the folder holds. Raises ValueError where it is no folder of two or more classes."""
    asked, root = f"data.name={FOLDER + path!r}", Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{asked} is not a folder")
    folders = {SPLITS[name]: root / name for name in SPLITS if _folders(root / name)}
    if "train" not in folders:
        folders = {"train": root}
    classes = _folders(folders["train"])
    if not classes:
        raise ValueError(f"{asked} has no sub-folders; one for each class is needed")
    if len(classes) == 1:
        raise ValueError(f"{asked} has one class only, {classes[0]!r}; two or more are needed")

    files, ignored, total, digest = {}, 0, 0, hashlib.sha256()
    for split, folder in folders.items():
        strange = sorted(set(_folders(folder)) - set(classes))
        if strange:
            raise ValueError(f"{asked}: {split} has the class {strange[0]!r}, which train has not")
        files[split] = []
        for label, name in enumerate(classes):
            for entry in _files(folder / name):
                if not entry.name.lower().endswith(ENDINGS):
                    ignored += 1
                    continue
                where = os.path.relpath(entry.path, root)
                state = entry.stat(follow_symlinks=os.path.exists(entry.path))
                total += state.st_size
                digest.update(f"{where}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
                files[split].append((where, label))
        empty = set(range(len(classes))) - {label for _, label in files[split]}
        if split == "train" and empty:
            raise ValueError(f"{asked}: the class {classes[min(empty)]!r} has no PNG or JPEG file")
        if not files[split]:
            raise ValueError(f"{asked}: {split} has no PNG or JPEG file")
    return Listing(tuple(classes), files, ignored, total, digest.hexdigest()[:12])


def _folders(path: Path) -> list[str]:
    """Names of the sub-folders in alphabetical order, but for the hidden ones."""
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(path: Path) -> list[os.DirEntry]:
    """The files of a class, in alphabetical order, those of its sub-folders too."""
    if not path.is_dir():
        return []
    found = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            found += _files(Path(entry.path)) if entry.is_dir() else [entry]
    return found
