"""The files of one checkpoint step: which there are, which jdm wrote, and how they are deleted.

What a person has put into the folder of a step is never deleted: it is moved to `<step>.kept`.
"""

import itertools
import os
import re
import time
import warnings
from collections.abc import Iterator

from etils import epath

from jdm.errors import Failure
from jdm.files import is_system, read_json
from jdm.orbax import HANDLERS

CHECKSUMS = "checksums.json"
PARTIAL = re.compile(r"\d+\.partial(\.orbax-checkpoint-tmp(-\d+)?)?")
FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax's, beside the folders of the items
ASIDE = re.compile(r"\d+\.bad(-\d+)?")


def files_of(root: epath.Path) -> dict[str, epath.Path]:
    """{relative path: path} of every file of a step, without the checksums."""
    files = {p.relative_to(root).as_posix(): p for p in walk(root) if not p.is_dir()}
    return {name: path for name, path in files.items() if name != CHECKSUMS}


def walk(folder: epath.Path, follow: bool = True) -> Iterator[epath.Path]:
    """What is below a folder, files before their folders. follow: also below symbolic links."""
    for path in folder.iterdir():  # epath has no rglob
        if path.is_dir() and (follow or not os.path.islink(path)):
            yield from walk(path, follow)
        yield path


def free(path: epath.Path) -> epath.Path:
    """The path, or the first of <path>-2, <path>-3, … that does not exist."""
    names = (f"{path.name}-{n}" for n in itertools.count(2))
    while path.exists():
        path = path.parent / next(names)
    return path


def sweep(folder: epath.Path) -> bool:
    """Removes what interrupted saves left, also Orbax's `<step>.partial.orbax-...`; True if any.

    What a person has put into such a folder is moved to `<step>.kept` first, with a warning.
    """
    named = [path for path in folder.iterdir() if PARTIAL.fullmatch(path.name)]
    left = [path for path in named if path.is_dir() and not os.path.islink(path)]
    for path in left:
        if added := _added(path):
            kept = free(folder / f"{path.name.partition('.')[0]}.kept")
            for name, file in added.items():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                file.rename(kept / name)
            warnings.warn(f"moved files that jdm has not written to {kept}", stacklevel=2)
        path.rmtree()
    return bool(left)


def _added(root: epath.Path) -> dict[str, epath.Path]:
    """{relative path: path} of the files and links in a step, whole or not, that a person added."""
    try:
        ours = read_json(root / CHECKSUMS)
    except (Failure, FileNotFoundError):  # an interrupted save
        ours = {}

    def written(name: str) -> bool:
        # Orbax adds .orbax-checkpoint-tmp to the folder of an item until the item is whole.
        return name in ours if ours else name in FILES or re.split("[./]", name)[0] in HANDLERS

    below = walk(root, follow=False)
    files = {p.relative_to(root).as_posix(): p for p in below if os.path.islink(p) or p.is_file()}
    return {
        k: p for k, p in files.items() if not (k == CHECKSUMS or is_system(p.name) or written(k))
    }


def sweep_failed(folder: epath.Path) -> None:
    """The same after a failed save, while tensorstore's threads may still be writing.

    Their writes can make a removal fail or create files again, so this returns when it has found
    nothing twice in a row. What is left after five seconds is removed by the next save.
    """
    clean = 0 if folder.is_dir() else 2
    for _ in range(50):
        if clean == 2:
            return
        try:
            clean = 0 if sweep(folder) else clean + 1
        except OSError:
            clean = 0
        time.sleep(0.1)
