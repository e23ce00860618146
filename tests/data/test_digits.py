import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jdm.data.datasets import DATASETS
from jdm.data.digits import digits, split_indices
from jdm.data.splits import ReadOptions, load_split

SPLITS = ("train", "validation", "test")


def test_pixels_cover_the_range_of_uint8():
    images, labels = digits()
    raw = load_digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    assert np.array_equal(np.unique(images), np.round(np.arange(17) * 255 / 16))
    assert np.array_equal(np.round(images[..., 0] * (16 / 255)), raw.images)  # no value is lost
    assert np.array_equal(labels, raw.target)


def test_splits_hold_every_image_once_in_the_sizes_of_the_table():
    rows = split_indices(digits()[1])
    sizes = {split: len(rows[split]) for split in SPLITS}
    assert sizes == {"train": 1257, "validation": 180, "test": 360} == DATASETS["digits"].splits
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(1797))


def test_no_image_is_in_two_splits():
    # Rows are disjoint, and no two rows hold equal pixels.
    assert len(np.unique(digits()[0].reshape(1797, -1), axis=0)) == 1797


def test_splits_are_stratified():
    labels = digits()[1]
    for rows in split_indices(labels).values():
        share = np.bincount(labels[rows], minlength=10) / np.bincount(labels)
        assert np.all(np.abs(share - len(rows) / 1797) < 0.006)  # at most one image off


def test_splits_never_change():
    """Published results hold for these splits: a new scikit-learn must not change them."""
    rows = split_indices(digits()[1])
    digest = hashlib.sha256(np.concatenate([rows[s] for s in SPLITS]).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "d6ec6ce85e273b3e"


@pytest.mark.parametrize("split", SPLITS)
def test_round_trip(split, digits_dir):
    images, labels = digits()
    rows = split_indices(labels)[split]
    read_images, read_labels = load_split("digits", split, ReadOptions(digits_dir))
    assert (read_images.dtype, read_labels.dtype) == (np.uint8, np.int32)
    assert np.array_equal(read_images, images[rows])
    assert np.array_equal(read_labels, labels[rows])
