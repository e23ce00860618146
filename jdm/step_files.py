"""The files of one checkpoint step: which there are, which jdm wrote, and how they are deleted.

What a person has put into the folder of a step is never deleted: it is moved to `<step>.kept`.
"""

import itertools
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


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():  # epath has no rglob
        if path.is_dir():
            yield from walk(path)
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
    left = [p for p in folder.iterdir() if PARTIAL.fullmatch(p.name) and p.is_dir()]
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
    """{relative path: path} of the files in a step, whole or not, that a person has added."""
    try:
        ours = read_json(root / CHECKSUMS)
    except (Failure, FileNotFoundError):  # an interrupted save
        ours = {}

    def written(name: str) -> bool:
        # Orbax adds .orbax-checkpoint-tmp to the folder of an item until the item is whole.
        return name in ours if ours else name in FILES or re.split("[./]", name)[0] in HANDLERS

    files = {name: path for name, path in files_of(root).items() if not is_system(path.name)}
    return {name: path for name, path in files.items() if not written(name)}


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
