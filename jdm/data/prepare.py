"""Prepares a data set: downloads it, or copies a folder, to records, and then decodes them.

TFDS does the work; this module owns the checks before it and the error messages after it. An
interrupted preparation leaves nothing under the final name.
"""

import contextlib
import errno
import functools
import importlib.util
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from jdm.data import DataError
from jdm.data.datasets import Dataset
from jdm.data.folder import listing
from jdm.data.images import check_room, mebibytes
from jdm.data.lookup import dataset
from jdm.data.records import make_builder
from jdm.data.splits import DECODED, ReadOptions, stored_split, whole_split
from jdm.errors import InvalidValue
from jdm.files import local_path, one_at_a_time
from jdm.messages import STDERR, STDOUT, say
from jdm.names import FOLDER


def prepare(
    name: str,
    data_dir: str = "",
    *,
    size: int | None = None,
    skip_broken: bool = False,
    originals: str = "",
) -> Path:
    """Prepares a data set, unless it is prepared already, and returns the folder of its records.

    name: see `lookup.dataset`. data_dir: see `splits.ReadOptions`. size: height and width of the
    decoded images; None is the data set's default, and a folder, which has none, is not decoded.
    skip_broken: whether to omit the broken images of a folder. originals: a folder that holds the
    files which TFDS would download, with their original names; "" downloads them.

    Raises InvalidValue for an unknown name, and for a folder of originals that lacks a file or has
    one with another checksum than TFDS knows. Raises DataError where TensorFlow, the network, room
    on the disk or readable images are missing.
    """
    data_dir = data_dir and local_path("data_dir", data_dir)
    facts = dataset(name)
    say(description(facts), STDOUT)
    originals = originals and local_path("from", originals)
    options = dict(skip_broken=skip_broken) if facts.is_folder else {}
    builder = make_builder(facts, data_dir, **options)
    path = Path(builder.data_path)
    if originals and not facts.download:
        raise InvalidValue("from", originals, f"does not go with {name}, which is not downloaded")
    if not path.exists():
        if originals:
            check_originals(name, builder.url_infos, Path(originals))
        _check_possible(facts, path)
        waits = functools.partial(say, f"waiting for another process, which prepares {name}")
        with one_at_a_time(path, waits):
            if not path.exists():  # otherwise another process has prepared it meanwhile
                _prepare_records(facts, builder, path, originals)
        # If another process was faster, the old builder knows no splits.
        builder = make_builder(facts, data_dir, **options)
    if facts.is_folder:
        for split, count in facts.splits.items():
            if missing := count - builder.info.splits[split].num_examples:
                say(f"left out: broken images of {split}: {missing:,}", STDOUT)
    size = size or next(iter(facts.sizes), None)
    if size:
        for split in {stored_split(facts, split) for split in facts.splits} - {"extra"}:
            whole_split(facts, split, ReadOptions(data_dir, size, facts.channels or 3))
    return path


def description(facts: Dataset) -> str:
    """What a data set consists of, as it was understood: splits, classes and what is left out."""
    if facts.is_folder:
        return f"{facts.name} is read as\n{listing(facts.name.removeprefix(FOLDER))}"
    splits = ", ".join(f"{name} {count:,}" for name, count in facts.splits.items())
    drawn = f" ({' and '.join(facts.from_train)} are drawn from train)" * bool(facts.from_train)
    kind = "attributes" if facts.multi_label else "classes"
    return f"{facts.name}: {splits} images{drawn}, {facts.num_classes} {kind}"


def check_originals(name: str, expected: Mapping[str, Any], folder: Path) -> None:
    """Raises InvalidValue unless a folder holds all files of a data set, with their checksums.

    expected: {URL: size, checksum and filename}, of TFDS.
    """
    from tensorflow_datasets.core.download import checksums  # slow to import

    def refuse(allowed: str, details: tuple = ()):
        raise InvalidValue("from", str(folder), allowed, "", details)

    if not folder.is_dir():
        refuse("is not a folder")
    files = {url: folder / info.filename for url, info in expected.items()}
    if missing := {url: path for url, path in files.items() if not path.is_file()}:
        named = ", ".join(path.name for path in missing.values())
        lines = tuple(f"{path.name}: {url}" for url, path in missing.items())
        refuse(f"lacks {len(missing)} of the {len(files)} original files of {name}: {named}", lines)
    for url, path in files.items():
        found = checksums.compute_url_info(epath.Path(path))
        if found != expected[url]:
            differs = f"its SHA-256 is {found.checksum}, not {expected[url].checksum}"
            refuse(f"holds {path.name}, which is not the original file: {differs}")


def _check_possible(facts: Dataset, path: Path) -> None:
    """Raises DataError where TensorFlow, or room on the disk, is missing."""
    name = facts.name
    if facts.download and importlib.util.find_spec("tensorflow") is None:
        why = f"preparing {name} needs TensorFlow (reading it does not): pip install 'jdm[prepare]'"
        raise DataError(f"{why}; the download is {mebibytes(facts.download)}")
    needed = listing(name.removeprefix(FOLDER)).total if facts.is_folder else 2 * facts.download
    existing = next(parent for parent in path.parents if parent.exists())
    check_room(existing, needed, f"preparing {name}", "--data_dir")


def _prepare_records(facts: Dataset, builder: Any, path: Path, originals: str) -> None:
    """Writes the records, and turns errors into DataError."""
    import tensorflow_datasets as tfds

    name = facts.name
    if not STDERR.isatty():
        tfds.disable_progress_bar()
    options = {}
    if originals:
        # TFDS takes a file from here where it has the name that the download would have.
        options["download_config"] = tfds.download.DownloadConfig(manual_dir=originals)
        say(f"reading the original files of {name} in {originals}")
    elif facts.download:
        say(f"downloading {name}, {mebibytes(facts.download)}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's messages; its bars use stderr
            builder.download_and_prepare(**options)
    except Exception as error:  # TFDS, its downloader and TensorFlow share no error type
        if path.exists():  # on a disk without locks another process was faster
            return
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
