"""benchmarks/mnist5k.py: real 28×28 digits, without a download, as a folder of images."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jdm.data.folder import listing


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "mnist5k.py"))


def test_splits_hold_all_images_and_the_same_number_of_each_class(script):
    splits = script["mnist5k"]()
    for name, each in (("train", 400), ("test", 100)):
        images, labels = splits[name]
        assert images.shape == (10 * each, 28, 28, 1) and images.max() == 255
        assert np.bincount(labels).tolist() == [each] * 10
    every = np.concatenate([images for images, _ in splits.values()]).reshape(5000, -1)
    assert len(np.unique(every, axis=0)) > 4990  # hardly any duplicates: no row is lost


def test_jdm_reads_the_folder(script, tmp_path):
    few = {name: (x[::100], y[::100]) for name, (x, y) in script["mnist5k"]().items()}
    script["write_folder"](tmp_path / "new", few, "0123456789")
    found = listing(str(tmp_path / "new"))
    assert found.classes == tuple("0123456789")
    for split, (images, labels) in few.items():
        assert [label for _, label in found.files[split]] == sorted(labels.tolist())
        path, label = found.files[split][0]
        first = images[labels == label][0, ..., 0]
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / path)), first)
    with pytest.raises(FileExistsError):
        script["write_folder"](tmp_path / "new", few, "0123456789")
