"""How a data set gets onto the disk: downloaded or copied into records, then decoded.

Owns the checks before and the sentences after; TFDS does the work. What is interrupted leaves
nothing under the name of what is prepared.
"""

import contextlib
import errno
import importlib.util
import io
import shutil
import sys
from pathlib import Path
from typing import Any

from jdm.data import DataError
from jdm.data.datasets import FOLDER, Dataset, dataset
from jdm.data.folder import listing
from jdm.data.records import make_builder
from jdm.data.splits import DECODED, stored_split, whole_split


def prepare(
    name: str, data_dir: str = "", *, size: int | None = None, skip_broken: bool = False
) -> Path:
    """Prepares a data set unless it is prepared; returns the folder of its records.

    name: as in `jdm.data.datasets`. data_dir: see `splits.load_split`. size: of the images that are
    decoded at once, so that training need not; None is that of the table, and of a folder, which
    has none, leaves it to the first who reads it. skip_broken: leave out the images of a folder
    that cannot be read.

    Raises ValueError for an unknown name, DataError for what is missing: TensorFlow, the network,
    room on the disk, or images that can be read.
    """
    facts = dataset(name)
    options = dict(skip_broken=skip_broken) if facts.is_folder else {}
    builder = make_builder(facts, data_dir, **options)
    path = Path(builder.data_path)
    if not path.exists():
        _make_records(facts, builder, path)
    size = size or next(iter(facts.sizes), None)
    if size:
        for split in {stored_split(facts, split) for split in facts.splits} - {"extra"}:
            whole_split(facts, split, data_dir, size, facts.channels or 3)
    return path


def _make_records(facts: Dataset, builder: Any, path: Path) -> None:
    """Writes the records, in one piece or not at all."""
    name = facts.name
    if facts.download and importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"preparing {name} needs TensorFlow, which reading it does not: pip install "
            f"'jdm[prepare]'; the download is {mebibytes(facts.download)}"
        )
    _check_room(facts, path)
    if facts.download:
        print(f"downloading {name}, {mebibytes(facts.download)}", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its bars are on the other stream
            builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:  # TFDS, its downloader and TensorFlow share no type
        # ArrayRecord has no errno.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise DataError(f"no space is left in {path.parent} for {name}") from error
        if not facts.download:
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} could not be downloaded and prepared: {said}") from error
    if facts.is_folder:  # what the folder held before
        root = path.parents[2]
        prepared = root.glob(f"folder/{builder.same_folder}*")
        for old in (*prepared, *root.glob(f"{DECODED}/folder-{builder.same_folder}*")):
            if path.parent.name not in old.name:
                shutil.rmtree(old, ignore_errors=True)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _check_room(facts: Dataset, path: Path) -> None:
    """Raises DataError where the disk cannot hold the download and what is made of it."""
    folder = next(parent for parent in path.parents if parent.exists())
    needed = 2 * facts.download
    if facts.is_folder:
        needed = listing(facts.name.removeprefix(FOLDER)).total
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"preparing {facts.name} takes about {mebibytes(needed)}, but {folder} has room for "
            f"{mebibytes(free)}; --data_dir names another folder"
        )
