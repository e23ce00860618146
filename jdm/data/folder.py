"""A folder of the user's own images as a data set: a sub-folder for each class.

    /path/cat/1.jpg  /path/dog/2.png                        one split, "train"
    /path/train/cat/1.jpg  /path/test/dog/2.png             a folder for each split

Owns the listing of such a folder. The images are PNG or JPEG files, grey or colour, of any size.
jdm.data.folder_builder copies them unchanged, and jdm.data.decoding resizes them.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

from jdm.errors import InvalidValue
from jdm.names import FOLDER

ENDINGS = (".png", ".jpg", ".jpeg")
# {name of a folder: the split that it holds}
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The contents of a folder when it was listed.

    classes: their names in alphabetical order; class k has the label k. files: {split: [(path
    relative to the folder, label)]}. ignored: the number of other files. total: bytes of all
    images. fingerprint: a hash of their names, sizes and modification times.
    """

    classes: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    ignored: int
    total: int
    fingerprint: str


@functools.lru_cache(maxsize=4)
def listing(path: str) -> Listing:
    """Lists a folder. Raises InvalidValue where it is not a folder of two or more classes."""

    def invalid(allowed: str) -> InvalidValue:
        return InvalidValue("config.data.name", FOLDER + path, allowed)

    root = Path(path).expanduser()
    if not root.is_dir():
        raise invalid("is not a folder")
    folders = {SPLITS[name]: root / name for name in SPLITS if _folders(root / name)}
    if "train" not in folders:
        folders = {"train": root}
    classes = _folders(folders["train"])
    if not classes:
        raise invalid("has no sub-folders; one for each class is needed")
    if len(classes) == 1:
        raise invalid(f"has one class only, {classes[0]!r}; two or more are needed")

    files: dict[str, list[tuple[str, int]]] = {}
    ignored, total, digest = 0, 0, hashlib.sha256()
    for split, folder in folders.items():
        if unknown := sorted(set(_folders(folder)) - set(classes)):
            raise invalid(f"has the class {unknown[0]!r} in {split}, but not in train")
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
            raise invalid(f"has no PNG or JPEG file of the class {classes[min(empty)]!r}")
        if not files[split]:
            raise invalid(f"has no PNG or JPEG file in {split}")
    return Listing(tuple(classes), files, ignored, total, digest.hexdigest()[:12])


def _entries(path: Path) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden, in alphabetical order; [] if there is none."""
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in _entries(path) if entry.is_dir()]


def _files(path: Path) -> list[os.DirEntry]:
    """The files of a class, also those in sub-folders, in alphabetical order."""
    found: list[os.DirEntry] = []
    for entry in _entries(path):
        found += _files(Path(entry.path)) if entry.is_dir() else [entry]
    return found
