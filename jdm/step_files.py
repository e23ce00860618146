"""The files of one checkpoint step: which there are, which jdm wrote, and how they are deleted.

Where folders can be renamed, an unfinished step has another name. In a bucket, a step is finished
when its checksums are there: they are written last, and deleted first.

What a person has put into the folder of a step is never deleted: it is moved to `<step>.kept`.
"""

import itertools
import os
import re
import time
import warnings

from etils import epath

from jdm.errors import Failure
from jdm.files import is_system
from jdm.orbax import HANDLERS
from jdm.storage import BucketError, storage_of

CHECKSUMS = "checksums.json"
PARTIAL = re.compile(r"\d+\.partial(\.orbax-checkpoint-tmp(-\d+)?)?")
FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax's, beside the folders of the items
ASIDE = re.compile(r"\d+\.bad(-\d+)?")


def steps_of(folder: epath.Path) -> list[int]:
    """The finished steps in a folder, ascending; [] where there are none."""
    storage = storage_of(folder)
    names = [name for name in storage.folders(folder) if _is_step(name)]
    return sorted(int(name) for name in names if storage.renames or _has_checksums(folder / name))


def unfinished(folder: epath.Path, step: int) -> epath.Path:
    """Where a step is written until it is finished."""
    return folder / (f"{step}.partial" if storage_of(folder).renames else str(step))


def files_of(root: epath.Path) -> dict[str, epath.Path]:
    """{relative path: path} of every file of a step, without the checksums."""
    files = storage_of(root).files(root)
    return {name: path for name, path in files.items() if name != CHECKSUMS}


def free(path: epath.Path) -> epath.Path:
    """The path, or the first of <path>-2, <path>-3, … that does not exist."""
    taken, names = storage_of(path).names(path.parent), itertools.count(2)
    first = path.name
    while path.name in taken:
        path = path.parent / f"{first}-{next(names)}"
    return path


def discard(path: epath.Path) -> None:
    """Deletes a finished step. If that is interrupted, the step is not finished any more."""
    storage = storage_of(path)
    if storage.renames:
        storage.move(path, path.with_name(f"{path.name}.partial"))
    else:
        _keep_added(path)
        storage.remove(path / CHECKSUMS)
    sweep(path.parent)


def sweep(folder: epath.Path) -> bool:
    """Removes what interrupted saves left, also Orbax's `<step>.partial.orbax-...`; True if any.

    What a person has put into such a folder is moved to `<step>.kept` first, with a warning.
    """
    storage = storage_of(folder)
    left = [folder / name for name in storage.folders(folder) if _is_left(folder / name)]
    for path in left:
        _keep_added(path)
        storage.remove(path)
    return bool(left)


def _is_left(path: epath.Path) -> bool:
    """Whether a folder is that of an interrupted save or deletion."""
    if PARTIAL.fullmatch(path.name):
        return not os.path.islink(path)
    whole = storage_of(path).renames or not _is_step(path.name)
    return not (whole or _has_checksums(path))


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _has_checksums(root: epath.Path) -> bool:
    return CHECKSUMS in storage_of(root).names(root)


def _keep_added(root: epath.Path) -> None:
    """Moves what a person has put into a step to `<step>.kept`, with a warning."""
    storage = storage_of(root)
    if added := _added(root):
        kept = free(root.with_name(f"{root.name.partition('.')[0]}.kept"))
        for name, file in added.items():
            storage.move(file, kept / name)
        warnings.warn(f"moved files that jdm has not written to {kept}", stacklevel=2)


def _added(root: epath.Path) -> dict[str, epath.Path]:
    """{relative path: path} of the files and links in a step, whole or not, that a person added."""
    storage = storage_of(root)
    try:
        ours = storage.read_json(root / CHECKSUMS)
    except BucketError:
        raise
    except (Failure, FileNotFoundError):  # an interrupted save
        ours = {}

    def written(name: str) -> bool:
        # Orbax adds .orbax-checkpoint-tmp to the folder of an item until the item is whole.
        return name in ours if ours else name in FILES or re.split("[./]", name)[0] in HANDLERS

    files = storage.files(root, follow=False)
    return {
        k: p for k, p in files.items() if not (k == CHECKSUMS or is_system(p.name) or written(k))
    }


def sweep_failed(folder: epath.Path) -> None:
    """The same after a failed save, while tensorstore's threads may still be writing.

    Their writes can make a removal fail or create files again, so this returns when it has found
    nothing twice in a row. What is left after five seconds is removed by the next save.
    """
    clean = 0
    for _ in range(50):
        if clean == 2:
            return
        try:
            clean = 0 if sweep(folder) else clean + 1
        except BucketError:  # it does not answer, or refuses
            return
        except OSError:
            clean = 0
        time.sleep(0.1)
