"""Prepared files: what TFDS has written of a data set, how it gets there, and how it is read.

Owns the builders, where they keep their files, and what is said when the files are not there or not
whole. Reads encoded images and their labels; never imports TensorFlow, which only the preparing of
the downloaded sets needs (the extra `prepare`).
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jdm.data import DataError
from jdm.data.datasets import FOLDER, Dataset, dataset

BLOCK = 128  # records that are read at once


class Records:
    """A prepared split: encoded images and their labels, in the order they were written in.

    A record is {"image": bytes, "label": int32 [], or int8 [K] of 0 and 1 of a multi-label set}.

    Raises ValueError for an unknown name or split, DataError where the files are not there, or
    cannot be read.
    """

    def __init__(self, name: str, split: str, data_dir: str = ""):
        self.facts, self._data_dir = dataset(name), data_dir
        builder = prepared(self.facts, data_dir)
        self.path = Path(builder.data_path)
        # Below the root are name, the configuration where a builder has one, and version.
        self.root = self.path.parents[2 if self.facts.is_folder else 1]
        with _damage(self.facts, self.path, self._data_dir):
            import tensorflow_datasets as tfds
            from tensorflow_datasets.proto import tf_example_pb2

            self._source = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
            # TFDS would take longer to make arrays of a record than to read it.
            self._parse = tf_example_pb2.Example.FromString
            if self.facts.multi_label:
                names = builder.info.features["attributes"]
                self._attributes = [f"attributes/{name}" for name in names]
            expected = self._expected(split)
            if expected is not None and len(self._source) != expected:
                raise ValueError(f"{len(self)} images in {split} instead of {expected}")

    def _expected(self, split: str) -> int | None:
        """The number of records that the table knows of; None of a folder of one's own."""
        if self.facts.is_folder:
            return None
        if self.facts.carved:
            return sum(self.facts.splits.values())
        return self.facts.splits[split]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with _damage(self.facts, self.path, self._data_dir):
            return self._record(i, self._source[i])

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several at once, which takes a fraction of the time of one by one."""
        with _damage(self.facts, self.path, self._data_dir):
            stored = self._source.__getitems__(rows)
            return [self._record(i, one) for i, one in zip(rows, stored, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), BLOCK):
            yield from self.__getitems__(range(start, min(start + BLOCK, len(self))))

    def _record(self, i: int, stored: bytes) -> dict[str, Any]:
        if not stored:  # what ArrayRecord makes of a file cut short
            raise ValueError(f"record {i} is empty")
        found = self._parse(stored).features.feature
        (image,) = found["image"].bytes_list.value
        if self.facts.multi_label:
            values = [found[name].int64_list.value[0] for name in self._attributes]
            return {"image": image, "label": np.array(values, np.int8)}
        (label,) = found["label"].int64_list.value
        if not -1 <= label < self.facts.num_classes:
            raise ValueError(f"record {i} has the label {label}")
        return {"image": image, "label": np.int32(label)}

    def fingerprint(self, split: str) -> str:
        """Of what the files say of themselves, and their sizes: the same for every copy of them."""
        digest = hashlib.sha256((self.path / "dataset_info.json").read_bytes())
        for path in sorted(self.path.glob(f"*-{split}.*")):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        return digest.hexdigest()[:8]


@contextlib.contextmanager
def _damage(facts: Dataset, path: Path, data_dir: str) -> Iterator[None]:
    """What goes wrong while prepared files are read, as a DataError."""
    try:
        yield
    except Exception as error:  # TFDS, ArrayRecord and PIL share no type for "damaged"
        again = (
            "they will be made again"
            if facts.alone
            else f"run {command(facts.name, data_dir)} again"
        )
        raise DataError(
            f"The prepared files of {facts.name} in {path} cannot be read ({error}): delete that "
            f"folder and {again}."
        ) from error


def command(name: str, data_dir: str = "") -> str:
    """What prepares a data set."""
    where = [f"--data_dir={data_dir}"] if data_dir else []
    return shlex.join(["jdm", "data", "prepare", name, *where])


def is_prepared(name: str, data_dir: str = "") -> bool:
    """Whether a data set's files are there. Raises ValueError for an unknown name, DataError for
    files of another format."""
    return make_builder(dataset(name), data_dir).data_path.exists()  # TFDS writes beside, renames


def check_prepared(name: str, data_dir: str = "") -> None:
    """Raises DataError, with the command that helps, where training would find no files."""
    facts = dataset(name)
    if not facts.alone:
        prepared(facts, data_dir)


def prepared(facts: Dataset, data_dir: str) -> Any:
    """The builder of a set whose files are there. Raises DataError where they are not.

    One that needs nothing from outside is prepared first; several processes may do so at once.
    """
    builder = make_builder(facts, data_dir)
    if not builder.data_path.exists():
        if not facts.alone:
            raise DataError(
                f"data.name={facts.name!r} is not prepared in {builder.data_path}; run "
                f"{command(facts.name, data_dir)}"
            )
        print(f"Preparing {facts.name} in {builder.data_path}.", file=sys.stderr)
        write_records(builder)
        builder = make_builder(facts, data_dir)  # the first may have lost a race: it knows no split
    return builder


def make_builder(facts: Dataset, data_dir: str, **options) -> Any:
    """The TFDS builder of a data set; options: of a folder's, see `folder_builder.Folder`."""
    import tensorflow_datasets as tfds  # here: takes most of a second

    module = importlib.import_module(facts.module)  # registers the builder
    # TFDS expands a ~ in some places only, and would leave a folder of that name behind.
    options |= dict(
        data_dir=os.path.expanduser(data_dir) if data_dir else None, file_format="array_record"
    )
    if facts.is_folder:
        said = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # it warns of a configuration that it does not know
        try:
            return module.Folder(path=facts.name.removeprefix(FOLDER), **options)
        finally:
            logging.set_verbosity(said)
    try:
        return tfds.builder(facts.name, **options)
    except ValueError as error:  # what is there already is in another format
        raise DataError(
            f"data.name={facts.name!r} is prepared in {data_dir or 'the usual folder of TFDS'} in "
            "another format than array_record, which alone can be read; another data.dir is needed"
        ) from error


def write_records(builder: Any) -> None:
    """Prepares quietly, in one piece or not at all."""
    try:
        with (  # TFDS's own bars and announcements; absl's log is not affected
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            builder.download_and_prepare()
    except OSError:
        # TFDS writes beside and renames. If the folder is there now, another process has
        # renamed its own, equal one a moment earlier.
        if not builder.data_path.exists():
            raise
