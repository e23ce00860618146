import numpy as np
import pytest

from jdm.analysis import metrics
from jdm.data.splits import load_split


@pytest.fixture(scope="module")
def splits():
    return {name: load_split("digits", name) for name in ("train", "test")}


def test_judges_know_real_digits_and_are_not_fooled_by_labels(splits):
    train, (images, labels) = splits["train"], splits["test"]
    right = metrics.class_agreement(*train, images, labels)
    wrong = metrics.class_agreement(*train, images, (labels + 1) % 10)
    assert set(right) == {"svc", "1-nn"}
    assert min(right.values()) > 0.96 and max(wrong.values()) < 0.02


def test_nearest_neighbour_ratio_of_the_real_a_copy_and_noise(splits):
    train, test = splits["train"][0], splits["test"][0]
    assert metrics.nearest_neighbour_ratio(train, test, test)["mean"] == pytest.approx(1)
    assert metrics.nearest_neighbour_ratio(train, test, train[:9]) == pytest.approx(
        {"mean": 0, "least": 0}, abs=1e-6
    )
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    assert metrics.nearest_neighbour_ratio(train, test, noise)["mean"] > 1.5


def test_distances_against_closed_form():
    black, white = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 255, np.uint8)
    assert metrics.nearest_distances(black, white)[0] == 2.0  # four pixels, each 1 apart
    images = np.concatenate([black, white, white])
    # Of the three pairs, two are 2 apart and one 0.
    assert metrics.within_class_distance(images, np.zeros(3, int))[0] == pytest.approx(4 / 3)


def test_diversity_ratio_sees_repeated_pictures(splits):
    images, labels = splits["train"]
    same = metrics.diversity_ratio(images, labels, images, labels)
    assert same["mean"] == pytest.approx(1) and same["least"] == pytest.approx(1)
    means = np.stack([images[labels == k].mean(axis=0) for k in range(10)]).astype(np.uint8)
    assert metrics.diversity_ratio(means[labels], labels, images, labels)["mean"] == 0
    with pytest.raises(ValueError, match="classes"):
        metrics.diversity_ratio(images[:1], labels[:1], images, labels)
