import numpy as np
import pytest

from jdm.analysis import metrics
from jdm.data.splits import load_split


@pytest.fixture(scope="module")
def splits():
    return {name: load_split("digits", name) for name in ("train", "test")}


def test_reference_classifiers_tell_right_labels_of_real_digits_from_wrong_ones(splits):
    reference, (images, labels) = metrics.ReferenceClassifiers(*splits["train"]), splits["test"]
    right = reference.agreement(images, labels)
    wrong = reference.agreement(images, (labels + 1) % 10)
    assert set(right) == {"svc", "1-nn"}
    assert min(right.values()) > 0.96 and max(wrong.values()) < 0.02


def test_a_fit_serves_all_calls_and_is_deterministic(splits, monkeypatch):
    from sklearn.svm import SVC

    fits, fit = [], SVC.fit
    monkeypatch.setattr(SVC, "fit", lambda *args: fits.append(1) or fit(*args))
    (train, train_labels), (images, labels) = splits["train"], splits["test"]
    one, other = (metrics.ReferenceClassifiers(train[:100], train_labels[:100]) for _ in range(2))
    right, wrong = (one.agreement(images, some) for some in (labels, (labels + 1) % 10))
    assert right == other.agreement(images, labels)
    assert right["svc"] > 0.9 and wrong["svc"] < 0.1
    np.testing.assert_array_equal(one.features(images), other.features(images))
    assert len(fits) == 2


def test_features_tell_classes_apart_and_real_images_from_noise(splits):
    train, train_labels = (array[:600] for array in splits["train"])  # half the time of a whole fit
    reference, (images, labels) = metrics.ReferenceClassifiers(train, train_labels), splits["test"]
    features, known = reference.features(images), reference.features(train)
    assert features.shape == (360, metrics.FEATURES) and features.min() == 0
    means = np.stack([known[train_labels == k].mean(axis=0) for k in range(10)])
    nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.9

    # Other real digits are nearer than digits without one of the classes, or noise.
    real = metrics.frechet_distance(known, features)
    without_3 = metrics.frechet_distance(known, reference.features(images[labels != 3]))
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert 0 < 3 * real < without_3 < metrics.frechet_distance(known, reference.features(noise))


def gaussian(mean, covariance, rows=200, seed=0):
    """Rows with exactly this mean and this covariance (over n - 1)."""
    z = np.random.default_rng(seed).normal(size=(rows, len(mean)))
    z = np.linalg.qr(z - z.mean(axis=0))[0] * np.sqrt(rows - 1)  # columns: mean 0, covariance 1
    return z @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_diagonal_covariances():
    a, b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    far = metrics.frechet_distance(
        gaussian(np.zeros(3), np.diag(a**2)), gaussian([1.0, 0.0, -2.0], np.diag(b**2), 300, 1)
    )
    assert far == pytest.approx(5 + ((a - b) ** 2).sum())


def test_frechet_distance_of_covariances_that_do_not_commute():
    s, r = np.diag([9.0, 1.0]), np.array([[2.0, 1.0], [1.0, 3.0]])
    # The root of a 2×2 matrix M has the trace sqrt(tr M + 2 sqrt(det M)).
    root = np.sqrt(np.trace(s @ r) + 2 * np.sqrt(np.linalg.det(s @ r)))
    a, b = gaussian(np.zeros(2), s), gaussian(np.zeros(2), r, seed=1)
    expected = np.trace(s + r) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected)


def test_frechet_distance_of_a_set_to_itself_and_to_a_shifted_copy():
    a = gaussian(np.arange(4.0), np.eye(4) + 0.5)
    assert metrics.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, a + [0.0, 3.0, 0.0, -4.0]) == pytest.approx(25)
    single = a[:, :1].astype(np.float32)  # one feature, and not in float64
    assert metrics.frechet_distance(single, single + 2) == pytest.approx(4)


def test_frechet_distance_of_fewer_rows_than_features():
    rng = np.random.default_rng(0)
    a, b = np.zeros((2, 6, 40))
    a[:, :20], b[:, 20:] = rng.normal(size=(2, 6, 20))
    # The supports are orthogonal, so only the traces and the means count.
    traces = a.var(axis=0, ddof=1).sum() + b.var(axis=0, ddof=1).sum()
    expected = traces + ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)
    assert 0 <= metrics.frechet_distance(a, a) < 1e-5
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_distance(a, b[:1])


def test_nearest_neighbour_ratio_of_real_images_copies_and_noise(splits):
    train, test = splits["train"].images, splits["test"].images
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


def test_diversity_ratio_sees_repeated_images(splits):
    images, labels = splits["train"]
    same = metrics.diversity_ratio(images, labels, images, labels)
    assert same["mean"] == pytest.approx(1) and same["least"] == pytest.approx(1)
    means = np.stack([images[labels == k].mean(axis=0) for k in range(10)]).astype(np.uint8)
    assert metrics.diversity_ratio(means[labels], labels, images, labels)["mean"] == 0
    with pytest.raises(ValueError, match="classes"):
        metrics.diversity_ratio(images[:1], labels[:1], images, labels)
