"""The packaged digits: 1,797 real handwritten digits, 8x8 pixels, ten classes, no download.

Owns the TFDS builder of scikit-learn's copy of the UCI handwritten digits, and their splits.
scikit-learn contains the images, so preparing them needs neither a network nor TensorFlow.

    pixel = round(v · 255 / 16),  v in {0, ..., 16}
    train | validation | test: 70 | 10 | 20 %, stratified by class, fixed
"""

import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from PIL import Image

from jdm.data.datasets import DATASETS


def digits() -> tuple[UInt8[np.ndarray, "1797 8 8 1"], Int[np.ndarray, "1797"]]:
    """All images, uint8 in [0, 255], and their labels in [0, 10), in scikit-learn's order."""
    from sklearn.datasets import load_digits  # slow to import, and only preparing needs it

    raw = load_digits()
    return np.round(raw.images * 255 / 16).astype(np.uint8)[..., None], raw.target


def split_indices(labels: Int[np.ndarray, " n"]) -> dict[str, Int[np.ndarray, " _"]]:
    """The rows of `digits()` in each split: disjoint, complete, and stratified by class.

    The rows of a split are shuffled, so that its first images are a random sample of it.
    """
    from sklearn.model_selection import train_test_split

    sizes, split = DATASETS["digits"].splits, functools.partial(train_test_split, random_state=0)
    rest, test = split(np.arange(len(labels)), test_size=sizes["test"], stratify=labels)
    train, validation = split(rest, test_size=sizes["validation"], stratify=labels[rest])
    return {"train": train, "validation": validation, "test": test}


class Digits(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of `digits`; importing this module registers it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(8, 8, 1), encoding_format="png")
        label = tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self,
            description="The 1,797 handwritten digits of scikit-learn, 8x8, scaled to [0, 255].",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # split_indices shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        images, labels = digits()
        return {
            split: self._generate_examples(images[rows], labels[rows])
            for split, rows in split_indices(labels).items()
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Encoded bytes: TFDS would need TensorFlow to encode an array.
            file = io.BytesIO()
            Image.fromarray(image[..., 0]).save(file, format="PNG")
            yield i, {"image": file.getvalue(), "label": int(label)}
