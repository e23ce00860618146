"""Records: encoded images with labels, in the ArrayRecord files that TFDS writes.

Owns the builders that write these files, their folders, and the errors where files are missing or
damaged. Reading never imports TensorFlow; only preparing a downloaded data set needs it (the extra
`prepare`).
"""

import contextlib
import hashlib
import importlib
import io
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jdm.data import DataError
from jdm.data.datasets import Dataset
from jdm.data.lookup import dataset
from jdm.files import home, local_path
from jdm.messages import say
from jdm.names import FOLDER

BLOCK = 128  # records in one read


class Records:
    """The records of a split, in the order of the files.

    A record is {"image": bytes, "label": int32 []}; the label of a multi-label data set is int8 [K]
    of 0 and 1. That of a folder also has "file", a str. root: the folder of all prepared data sets.
    path: the folder of this one. class_names: of the labels 0 to K - 1, or of the K attributes.

    Raises DataError where the files are missing or cannot be read.
    """

    def __init__(self, facts: Dataset, split: str, data_dir: str = ""):
        self._facts, self._data_dir = facts, data_dir
        builder = prepared(facts, data_dir)
        self.path = Path(builder.data_path)
        # <root>/<name>/<version>, or <root>/folder/<configuration>/<version>
        self.root = self.path.parents[2 if facts.is_folder else 1]
        with self._damage():
            import tensorflow_datasets as tfds
            from tensorflow_datasets.proto import tf_example_pb2

            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._source = builder.as_data_source(split, deserialize_method=raw)
            # Not the decoders of TFDS, which take longer than reading the record.
            self._parse = tf_example_pb2.Example.FromString
            label = builder.info.features["attributes" if facts.multi_label else "label"]
            self.class_names = tuple(label if facts.multi_label else label.names)
            self._labels = [f"attributes/{name}" for name in self.class_names]
            if not facts.is_folder:  # whose broken images may be left out
                sizes = facts.splits
                expected = sum(sizes.values()) if facts.from_train else sizes[split]
                if len(self) != expected:
                    raise ValueError(f"{len(self)} images in {split} instead of {expected}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The records of these rows. Reading many at once is much faster than one by one."""
        with self._damage():
            stored = self._source.__getitems__(rows)
            return [self._record(i, one) for i, one in zip(rows, stored, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), BLOCK):
            yield from self.__getitems__(range(start, min(start + BLOCK, len(self))))

    def _record(self, i: int, stored: bytes) -> dict[str, Any]:
        if not stored:  # ArrayRecord returns no bytes where a file was cut short
            raise ValueError(f"record {i} is empty")
        found = self._parse(stored).features.feature
        (image,) = found["image"].bytes_list.value
        if self._facts.multi_label:
            values = [found[name].int64_list.value[0] for name in self._labels]
            return {"image": image, "label": np.array(values, np.int8)}
        (label,) = found["label"].int64_list.value
        if not -1 <= label < self._facts.num_classes:
            raise ValueError(f"record {i} has the label {label}")
        record = {"image": image, "label": np.int32(label)}
        if "file" in found:  # of a folder, prepared by this version
            record["file"] = found["file"].bytes_list.value[0].decode()
        return record

    def fingerprint(self, split: str) -> str:
        """A hash of dataset_info.json and the files' names and sizes: the same for every copy."""
        digest = hashlib.sha256((self.path / "dataset_info.json").read_bytes())
        for path in sorted(self.path.glob(f"*-{split}.*")):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        return digest.hexdigest()[:8]

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Turns every error that occurs while records are read into a DataError."""
        try:
            yield
        except Exception as error:  # TFDS and ArrayRecord share no error type
            name, again = self._facts.name, "they are prepared again"
            if not self._facts.automatic:
                again = f"run {command(name, self._data_dir)} again"
            problem = f"the prepared files of {name} in {self.path} cannot be read ({error})"
            raise DataError(f"{problem}: delete that folder and {again}") from error


def command(name: str, data_dir: str = "") -> str:
    """The command that prepares a data set."""
    flags = [f"--data_dir={data_dir}"] if data_dir else []
    return shlex.join(["jdm", "data", "prepare", name, *flags])


def is_prepared(name: str, data_dir: str = "") -> bool:
    """Whether a data set is prepared. Raises as `lookup.dataset` and `make_builder` do."""
    # TFDS gives the folder this name when it is complete.
    return make_builder(dataset(name), data_dir).data_path.exists()


def check_prepared(name: str, data_dir: str = "") -> None:
    """Raises DataError, with the command to run, unless a data set is prepared or `automatic`."""
    facts = dataset(name)
    if not facts.automatic:
        prepared(facts, data_dir)


def prepared(facts: Dataset, data_dir: str) -> Any:
    """The builder of a prepared data set. Raises DataError where it is not prepared.

    An `automatic` data set is prepared first; several processes may do so at once.
    """
    builder = make_builder(facts, data_dir)
    if not builder.data_path.exists():
        if not facts.automatic:
            run = command(facts.name, data_dir)
            raise DataError(f"{facts.name} is not prepared in {builder.data_path}; run {run}")
        say(f"Preparing {facts.name} in {builder.data_path}.")
        hidden = io.StringIO()  # progress bars of TFDS; absl's log is still shown
        try:
            with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
                builder.download_and_prepare()
        except OSError:  # also where another process has prepared the same data a moment earlier
            if not builder.data_path.exists():
                raise
        # If another process was faster, the old builder knows no splits.
        builder = make_builder(facts, data_dir)
    return builder


def data_root(data_dir: str = "") -> str:
    """The folder of all prepared data sets. data_dir: its path; "" is $TFDS_DATA_DIR, or else
    ~/tensorflow_datasets.

    Raises DataError where there is none, InvalidValue for a path that is not local.
    """
    if data_dir:
        return local_path("config.data.dir", data_dir)
    if default := os.environ.get("TFDS_DATA_DIR"):
        return local_path("TFDS_DATA_DIR", default)
    if folder := home():
        return str(folder / "tensorflow_datasets")
    why = "there is no home folder for prepared data"
    raise DataError(f"{why}; name one by --data_dir, config.data.dir or $TFDS_DATA_DIR")


def make_builder(facts: Dataset, data_dir: str, **options) -> Any:
    """The TFDS builder of a data set. options: of a folder, see `folder_builder.Folder`.

    Raises DataError for data that was prepared in another format, InvalidValue for a data_dir that
    is not local.
    """
    import tensorflow_datasets as tfds  # slow to import

    module = importlib.import_module(facts.module)  # registers the builder
    data_dir = data_root(data_dir)
    options |= dict(data_dir=data_dir, file_format="array_record")
    if facts.is_folder:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # TFDS warns about every new configuration
        try:
            return module.Folder(path=facts.name.removeprefix(FOLDER), **options)
        finally:
            logging.set_verbosity(verbosity)
    try:
        return tfds.builder(facts.name, **options)
    except ValueError as error:  # prepared already, in another format
        problem = f"{facts.name} is prepared in {data_dir} in another format than array_record"
        raise DataError(f"{problem}, the only one that jdm reads; use another folder") from error
