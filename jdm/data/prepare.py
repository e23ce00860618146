"""Prepares a data set: downloads it, or copies a folder, to records, and then decodes them.

TFDS does the work; this module owns the checks before it and the error messages after it. An
interrupted preparation leaves nothing under the final name.
"""

import contextlib
import errno
import importlib.util
import io
import shutil
from pathlib import Path
from typing import Any

from jdm.data import DataError
from jdm.data.datasets import Dataset
from jdm.data.folder import listing
from jdm.data.images import check_room, mebibytes
from jdm.data.lookup import dataset
from jdm.data.records import make_builder
from jdm.data.splits import DECODED, ReadOptions, stored_split, whole_split
from jdm.messages import say
from jdm.names import FOLDER


def prepare(
    name: str, data_dir: str = "", *, size: int | None = None, skip_broken: bool = False
) -> Path:
    """Prepares a data set, unless it is prepared already, and returns the folder of its records.

    name: see `lookup.dataset`. data_dir: see `splits.ReadOptions`. size: height and width of the
    decoded images; None is the data set's default, and a folder, which has none, is not decoded.
    skip_broken: whether to omit the broken images of a folder.

    Raises InvalidValue for an unknown name, and DataError where TensorFlow, the network, room on
    the disk or readable images are missing.
    """
    facts = dataset(name)
    options = dict(skip_broken=skip_broken) if facts.is_folder else {}
    builder = make_builder(facts, data_dir, **options)
    path = Path(builder.data_path)
    if not path.exists():
        _prepare_records(facts, builder, path)
    size = size or next(iter(facts.sizes), None)
    if size:
        for split in {stored_split(facts, split) for split in facts.splits} - {"extra"}:
            whole_split(facts, split, ReadOptions(data_dir, size, facts.channels or 3))
    return path


def _prepare_records(facts: Dataset, builder: Any, path: Path) -> None:
    """Checks what is needed, writes the records, and turns errors into DataError."""
    name = facts.name
    if facts.download and importlib.util.find_spec("tensorflow") is None:
        why = f"preparing {name} needs TensorFlow (reading it does not): pip install 'jdm[prepare]'"
        raise DataError(f"{why}; the download is {mebibytes(facts.download)}")
    needed = listing(name.removeprefix(FOLDER)).total if facts.is_folder else 2 * facts.download
    existing = next(parent for parent in path.parents if parent.exists())
    check_room(existing, needed, f"preparing {name}", "--data_dir")
    if facts.download:
        say(f"downloading {name}, {mebibytes(facts.download)}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's messages; its bars use stderr
            builder.download_and_prepare()
    except Exception as error:  # TFDS, its downloader and TensorFlow share no error type
        # ArrayRecord's errors have no errno.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise DataError(f"no space is left in {path.parent} for {name}") from error
        if not facts.download:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} could not be downloaded and prepared: {reason}") from error
    if facts.is_folder:  # delete what was prepared before the folder changed
        root = path.parents[2]
        for pattern in ("folder/", f"{DECODED}/folder-"):
            for old in root.glob(f"{pattern}{builder.same_folder}*"):
                if path.parent.name not in old.name:
                    shutil.rmtree(old, ignore_errors=True)
