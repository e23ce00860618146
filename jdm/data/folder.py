"""A folder of the user's own images as a data set: a sub-folder for each class.

    /path/cat/1.jpg  /path/dog/2.png                        one split, "train"
    /path/train/cat/1.jpg  /path/Test/dog/2.png             a folder for each split

Owns the listing of such a folder: which files are images, and their splits and classes. The images
are PNG or JPEG files, grey or colour, of any size. jdm.data.folder_builder copies them unchanged,
and jdm.data.decoding resizes them.

A file name is bytes, as far as the system goes: here a str in which Python keeps bytes that are no
UTF-8 as lone surrogates. `shown` makes text of it.
"""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jdm.errors import InvalidValue
from jdm.files import local_path
from jdm.names import FOLDER

ENDINGS = (".png", ".jpg", ".jpeg")
# {name of a folder in lower case: the split that it holds}
SPLITS = {name: "train" for name in ("train", "training")}
SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev")}
SPLITS |= {name: "test" for name in ("test", "testing")}

LeftOut = collections.Counter[str]  # {what: how many}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The contents of a folder when it was listed.

    classes: their names, as text, in alphabetical order; class k has the label k. files: {split:
    [(path relative to the folder, label)]}. folders: {split: its folder, as text; "" where the
    classes are not in folders of splits}. left_out: {what: how many} of the entries that are not in
    `files`. note: advice about a layout that may be meant otherwise; "" for none. total: bytes of
    all images. fingerprint: a hash of their names, sizes and modification times.
    """

    classes: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    folders: dict[str, str]
    left_out: LeftOut
    note: str
    total: int
    fingerprint: str

    def __str__(self) -> str:
        """A table of the images in each class and split, and what was left out."""
        counts = {
            split: collections.Counter(label for _, label in files)
            for split, files in self.files.items()
        }
        named = {
            split: split if folder in ("", split) else f"{split} ({folder})"
            for split, folder in self.folders.items()
        }
        rows = [["class", *(named[split] for split in counts)]]
        for label, name in enumerate(self.classes):
            rows.append([f"{label} {name}", *(f"{one[label]:,}" for one in counts.values())])
        rows.append(["all", *(f"{one.total():,}" for one in counts.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
            for first, *rest in rows
        ]
        lines += [f"left out: {what}: {count:,}" for what, count in sorted(self.left_out.items())]
        return "\n".join([*lines, *filter(None, [self.note])])


def shown(name: str) -> str:
    """A file name as text that can be printed and stored: U+FFFD in place of anything else."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


@functools.lru_cache(maxsize=4)
def listing(path: str) -> Listing:
    """Lists a folder.

    Raises InvalidValue where it is not a folder of two or more classes, and where its layout can be
    understood in two ways.
    """

    def invalid(allowed: str, hint: str = "") -> InvalidValue:
        return InvalidValue("config.data.name", FOLDER + path, allowed, hint)

    root, left_out = Path(local_path("config.data.name", path)), LeftOut()
    if not root.is_dir():
        raise invalid("is not a folder")
    folders = _split_folders(root, invalid, left_out) or {"train": ""}
    for folder in {"", *folders.values()}:
        _count_stray(root / folder, left_out)
    within = f" in {shown(folders['train'])!r}" if folders["train"] else ""
    classes = _folders(root / folders["train"])
    if not classes:
        raise invalid(f"has no sub-folders{within}; one for each class is needed")
    if len(classes) == 1:
        raise invalid(f"has one class only{within}, {shown(classes[0])!r}; two or more are needed")

    files: dict[str, list[tuple[str, int]]] = {}
    total, digest = 0, hashlib.sha256()
    for split, folder in folders.items():
        if unknown := sorted(set(_folders(root / folder)) - set(classes)):
            raise invalid(f"has the class {shown(unknown[0])!r} in {split}, but not in train")
        files[split] = []
        for label, name in enumerate(classes):
            for entry in _images(root / folder / name, left_out):
                where = os.path.relpath(entry.path, root)
                state = entry.stat(follow_symlinks=os.path.exists(entry.path))
                total += state.st_size
                digest.update(os.fsencode(where))
                digest.update(f"\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
                files[split].append((where, label))
        empty = set(range(len(classes))) - {label for _, label in files[split]}
        if split == "train" and empty:
            raise invalid(f"has no PNG or JPEG file of the class {shown(classes[min(empty)])!r}")
        if not files[split]:
            raise invalid(f"has no PNG or JPEG file in {split}")
    texts = tuple(map(shown, classes))
    if len(set(texts)) < len(texts):  # names that differ only in bytes that are no text
        texts = tuple(os.fsencode(one).decode("utf-8", "backslashreplace") for one in classes)
    names = {split: shown(folder) for split, folder in folders.items()}
    note = _note(files["train"], classes) if folders["train"] == "" else ""
    return Listing(texts, files, names, left_out, note, total, digest.hexdigest()[:12])


def _split_folders(
    root: Path, invalid: Callable[..., InvalidValue], left_out: LeftOut
) -> dict[str, str]:
    """{split: the name of its folder}; {} where the folders in `root` are classes.

    Raises InvalidValue for anything between the two.
    """
    found: dict[str, str] = {}
    others = []
    for name in _folders(root):
        split = SPLITS.get(name.lower())
        has_images = next(_images(root / name, LeftOut()), None) is not None
        if split is None:
            others.append((name, has_images))
        elif not has_images and not _folders(root / name):
            left_out[f"folder {name!r}, which has no images"] += 1
        elif split in found:
            two = f"has two folders of the split {split}, {found[split]!r} and {name!r}"
            raise invalid(two, "put all images of a split into one")
        else:
            found[split] = name
    if not found:
        return {}
    for name, has_images in others:
        if has_images:
            split, other = next(iter(found.values())), shown(name)
            beside = f"has {split!r}, the name of a split, beside {other!r}, which is none"
            hint = f"move {other!r} into a split, or rename {split!r} if it is a class"
            raise invalid(beside, hint)
        left_out[f"folder {shown(name)!r}, which has no images"] += 1
    if "train" not in found:
        named = " and ".join(map(repr, found.values()))
        raise invalid(f"has {named}, but no folder 'train', which is needed beside a split")
    return {split: found[split] for split in dict.fromkeys(SPLITS.values()) if split in found}


def _note(files: list[tuple[str, int]], classes: list[str]) -> str:
    """Advice where the classes may be splits of other names: all have the same sub-folders."""
    below: dict[str, set[str]] = {name: set() for name in classes}
    for path, label in files:
        parts = Path(path).parts
        below[classes[label]].add(parts[1] if len(parts) > 2 else "")
    same = next(iter(below.values()))
    if len(same) < 2 or "" in same or any(names != same for names in below.values()):
        return ""
    listed = ", ".join(sorted(map(shown, same))[:5])
    return (
        f"note: every class has the same sub-folders ({listed}); if these are the classes, call "
        "the folders above them train, validation and test"
    )


def _is_image(entry: os.DirEntry) -> bool:
    """Whether a file has the name of an image. A link to nowhere does: it is a broken image."""
    usual = entry.is_file() or not os.path.exists(entry.path)
    return usual and entry.name.lower().endswith(ENDINGS)


def _count_stray(folder: Path, left_out: LeftOut) -> None:
    """Counts the files that lie beside the folders of the classes or splits."""
    for entry in _entries(folder, left_out):
        if not entry.is_dir():
            what = "images" if _is_image(entry) else "other files"
            left_out[f"{what} in no folder of a class"] += 1


def _entries(path: Path, left_out: LeftOut | None = None) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden, in alphabetical order; counts the hidden."""
    with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    hidden = sum(entry.name.startswith(".") for entry in found)
    if hidden and left_out is not None:
        left_out["hidden files or folders"] += hidden
    return [entry for entry in found if not entry.name.startswith(".")]


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in _entries(path) if entry.is_dir()]


def _images(path: Path, left_out: LeftOut, above: tuple = ()) -> Iterator[os.DirEntry]:
    """The images of a class, also those in sub-folders, in alphabetical order; counts the others.

    above: the folders on the way here, so that a link to one of them is not followed.
    """
    if not path.is_dir():
        return
    state = path.stat()
    above = (*above, (state.st_dev, state.st_ino))
    for entry in _entries(path, left_out):
        if entry.is_dir():
            below = entry.stat()
            if (below.st_dev, below.st_ino) in above:
                left_out["links to a folder above"] += 1
            else:
                yield from _images(Path(entry.path), left_out, above)
        elif _is_image(entry):
            yield entry
        elif not entry.is_file():
            left_out["neither files nor folders"] += 1
        else:
            ending = shown(os.path.splitext(entry.name)[1].lower())
            left_out[f"files with the ending {ending or '(none)'}"] += 1
