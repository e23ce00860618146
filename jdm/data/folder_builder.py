"""The TFDS builder of a folder of images (jdm.data.folder).

Each file is decoded once, to find broken ones, and copied unchanged. The name of the prepared data
contains hashes of the folder's path and files, so a folder that changed has to be prepared again.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from jdm.data import DataError
from jdm.data.decoding import check_image
from jdm.data.folder import listing, shown
from jdm.files import local_path
from jdm.messages import STDERR, say


class Folder(tfds.core.GeneratorBasedBuilder):
    """A folder with a sub-folder for each class. skip_broken: whether to omit broken images."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, path: str, skip_broken: bool = False, **kwargs):
        self._root = Path(local_path("config.data.name", path)).resolve()
        self._listing = listing(path)
        self._skip_broken = skip_broken
        where = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:8]
        # TFDS allows no other characters in a name, and some have a meaning in a glob pattern.
        self.same_folder = f"{re.sub(r'[^A-Za-z0-9]+', '_', self._root.name)}-{where}-"
        config = tfds.core.BuilderConfig(name=self.same_folder + self._listing.fingerprint)
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, 3))
        label = tfds.features.ClassLabel(names=self._listing.classes)
        features = {"image": image, "label": label, "file": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of {shown(str(self._root))}, a sub-folder for each class.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # training shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        broken = self._broken()
        for path, why in broken.items():
            left_out = "left out: " if self._skip_broken else ""
            say(f"{left_out}{shown(path)} ({why})")
        if broken and not self._skip_broken:
            count = sum(map(len, self._listing.files.values()))
            named = "; ".join(f"{shown(path)} ({why})" for path, why in list(broken.items())[:3])
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            problem = f"{len(broken)} of {count:,} images in {self._root} cannot be read"
            raise DataError(f"{problem}: {named}{more}; --skip-broken leaves them out")
        readable = {
            split: [(path, label) for path, label in files if path not in broken]
            for split, files in self._listing.files.items()
        }
        classes = {self._listing.classes[label] for _, label in readable["train"]}
        missing = [split for split, files in readable.items() if not files]
        missing += [f"the class {name!r}" for name in self._listing.classes if name not in classes]
        if missing:
            raise DataError(f"no image of {missing[0]} in {self._root} can be read")
        return {split: self._generate_examples(files) for split, files in readable.items()}

    def _broken(self) -> dict[str, str]:
        """{path: what is wrong} of the images that cannot be decoded."""
        paths = [path for files in self._listing.files.values() for path, _ in files]
        broken = {}
        # disable=None hides the bar where there is no terminal.
        for path in tqdm(paths, desc="checking", unit=" images", file=STDERR, disable=None):
            try:
                why = check_image((self._root / path).read_bytes())
            except OSError as error:
                why = error.strerror or "cannot be opened"
            if why:
                broken[path] = why
        return broken

    def _generate_examples(self, files: list[tuple[str, int]]) -> Iterator[tuple[int, dict]]:
        for i, (path, label) in enumerate(files):
            # Encoded bytes: TFDS would need TensorFlow to encode an array.
            image = (self._root / path).read_bytes()
            yield i, {"image": image, "label": label, "file": shown(path)}
