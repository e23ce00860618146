"""The TFDS builder of a folder of images (jdm.data.folder).

Files are stored as they are, after each was decoded once to see that it can be. The name of what is
prepared holds the folder's path and the state of its files, so that a folder that has changed since
is not taken for the one that was prepared.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from jdm.data import DataError
from jdm.data.decoding import check_image
from jdm.data.folder import listing


class Folder(tfds.core.GeneratorBasedBuilder):
    """A folder with a sub-folder for each class; `skip_broken`: leave out what cannot be read."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, path: str, skip_broken: bool = False, **kwargs):
        self._root = Path(path).expanduser().resolve()
        self._listing = listing(path)
        self._skip_broken = skip_broken
        where = hashlib.sha256(str(self._root).encode()).hexdigest()[:8]
        # Letters and digits alone, as in the names that TFDS and a glob take.
        self.same_folder = f"{re.sub(r'[^A-Za-z0-9]+', '_', self._root.name)}-{where}-"
        config = tfds.core.BuilderConfig(name=self.same_folder + self._listing.fingerprint)
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of {self._root}, a sub-folder for each class.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=self._listing.classes),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # training draws its own order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        if self._listing.ignored:
            print(f"{self._listing.ignored:,} other files are ignored", file=sys.stderr)
        broken = self._broken()
        whole = sum(map(len, self._listing.files.values()))
        if broken and not self._skip_broken:
            named = "; ".join(f"{path} ({why})" for path, why in list(broken.items())[:3])
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise DataError(
                f"{len(broken)} of {whole:,} images in {self._root} cannot be read: {named}{more}; "
                "--skip-broken goes on without them"
            )
        left = {
            split: [(path, label) for path, label in files if path not in broken]
            for split, files in self._listing.files.items()
        }
        for split, files in left.items():
            if not files:
                raise DataError(f"no image of {split} in {self._root} can be read")
        classes = {label for _, label in left["train"]}
        for label, name in enumerate(self._listing.classes):
            if label not in classes:
                raise DataError(f"no image of the class {name!r} in {self._root} can be read")
        return {split: self._generate_examples(files) for split, files in left.items()}

    def _broken(self) -> dict[str, str]:
        """{path: reason} of the images that cannot be decoded."""
        paths = [path for files in self._listing.files.values() for path, _ in files]
        broken = {}
        for path in tqdm(paths, desc="checking", unit=" images"):
            try:
                why = check_image((self._root / path).read_bytes())
            except OSError as error:
                why = error.strerror or "cannot be opened"
            if why:
                broken[path] = why
        return broken

    def _generate_examples(self, files: list[tuple[str, int]]) -> Iterator[tuple[int, dict]]:
        for i, (path, label) in enumerate(files):
            # Bytes, not an array: TFDS would encode that with TensorFlow.
            yield i, {"image": (self._root / path).read_bytes(), "label": label}
