import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel

from jdm.analysis import metrics
from jdm.data.splits import load_split


@pytest.fixture(scope="module")
def splits():
    return {name: load_split("digits", name) for name in ("train", "test")}


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
    found = metrics.within_class_distance(images, np.zeros(3, int))
    assert found == {0: pytest.approx(4 / 3)}
    # A single image has no distance, and -1 is no class.
    assert metrics.within_class_distance(images, np.array([5, -1, -1])) == {}


def test_diversity_ratio_sees_repeated_images(splits):
    images, labels = splits["train"]
    same = metrics.diversity_ratio(images, labels, images, labels)
    assert same["mean"] == pytest.approx(1) and same["least"] == pytest.approx(1)
    means = np.stack([images[labels == k].mean(axis=0) for k in range(10)]).astype(np.uint8)
    assert metrics.diversity_ratio(means[labels], labels, images, labels)["mean"] == 0
    with pytest.raises(ValueError, match="no class has two or more images in both sets"):
        metrics.diversity_ratio(images[:1], labels[:1], images, labels)


def test_diversity_ratio_compares_the_same_classes(splits):
    """A class that one set lacks is left out; the others are not paired with it."""
    images, labels = splits["train"]
    kept = labels != 3
    without = metrics.diversity_ratio(images[kept], labels[kept], images, labels)
    assert without["mean"] == pytest.approx(1) and without["least"] == pytest.approx(1)


def test_nearest_distances_do_not_depend_on_the_blocks(splits, monkeypatch):
    train, test = splits["train"].images, splits["test"].images[:20]
    whole = metrics.nearest_distances(train, test)
    monkeypatch.setattr(metrics, "BLOCK", 100)
    np.testing.assert_allclose(metrics.nearest_distances(train, test), whole, atol=1e-12)


# Distances of features, against small independent formulas ----------------------------------------


@pytest.fixture(scope="module")
def features():
    """Two sets of different sizes and distributions, in float32 as extractors give them."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(12, 12)) / 3
    real, generated = rng.normal(size=(180, 12)) @ mix, 0.4 + rng.normal(size=(150, 12)) @ mix * 0.8
    return real.astype(np.float32), generated.astype(np.float32)


def test_frechet_distance_against_scipys_square_root_of_a_matrix(features):
    a, b = (x.astype(np.float64) for x in features)
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = a.var(axis=0, ddof=1).sum() + b.var(axis=0, ddof=1).sum() - 2 * np.trace(root)
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + traces
    assert metrics.frechet_distance(*features) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_against_scikit_learns_kernel(features, monkeypatch):
    a, b = features
    k_a, k_b, k_ab = (
        polynomial_kernel(x, y, degree=3, gamma=1 / 12, coef0=1).astype(np.float64)
        for x, y in ((a, a), (b, b), (a, b))
    )
    off = [k[~np.eye(len(k), dtype=bool)].mean() for k in (k_a, k_b)]
    expected = sum(off) - 2 * k_ab.mean()
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert metrics.kernel_distance(b, a) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_has_no_bias():
    """Between small sets of one distribution it is 0 on average, and so below 0 half the time."""
    rng = np.random.default_rng(0)
    found = [metrics.kernel_distance(*rng.normal(size=(2, 10, 4))) for _ in range(300)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300)
    assert 0.3 < np.mean(np.array(found) < 0) < 0.8


def test_kernel_distance_of_subsets(features):
    mean, deviation = metrics.kernel_distance_of_subsets(*features, subsets=40, size=100)
    assert mean == pytest.approx(metrics.kernel_distance(*features), abs=deviation)
    assert deviation > 0
    assert metrics.kernel_distance_of_subsets(*features, subsets=40, size=100) == (mean, deviation)
    other = metrics.kernel_distance_of_subsets(*features, subsets=40, size=100, seed=1)
    assert other != (mean, deviation)
    with pytest.raises(ValueError, match="a subset needs at least 1000 rows of features, not 150"):
        metrics.kernel_distance_of_subsets(*features)


def test_precision_and_recall_against_their_definition(features):
    real, generated = (x.astype(np.float64) for x in features)

    def share(rows, of):
        own = np.sort(cdist(of, of), axis=1)  # column 0 is the row itself
        return (cdist(rows, of) <= own[:, 3]).any(axis=1).mean()

    found = metrics.precision_recall(*features)
    assert found == (share(generated, real), share(real, generated))
    assert 0 < found.recall < found.precision < 1


def test_precision_and_recall_of_known_sets():
    """Generated rows in a corner of the real ones are precise, and recall little."""
    real, corner = np.random.default_rng(0).uniform(size=(2, 500, 2))
    same = metrics.precision_recall(real, real)
    assert same == (1, 1)
    found = metrics.precision_recall(real, corner * 0.2)
    assert found.precision > 0.9 and found.recall < 0.15
    assert metrics.precision_recall(real, real + 5) == (0, 0)
    with pytest.raises(ValueError, match="precision and recall needs at least 4 rows"):
        metrics.precision_recall(real[:3], real)


def test_prd_scores_of_known_histograms():
    """Real images of two modes, generated ones of one: all precise, half recalled."""
    precision, recall = metrics.prd_curve(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    assert precision.max() == pytest.approx(1) and recall.max() == pytest.approx(0.5)
    # At λ = 2, min(2 · 0.5, 1) = 1 is the precision, and 1 / 2 the recall.
    assert precision[recall > 0.499].max() == pytest.approx(1, abs=0.01)


def test_prd_scores_tell_lost_modes_from_wrong_images():
    rng = np.random.default_rng(0)
    modes = rng.normal(size=(10, 4)) * 20

    def rows(which, count=200):
        return modes[np.arange(count) % len(which) + which[0]] + rng.normal(size=(count, 4))

    few = dict(clusters=10, runs=3)
    same = metrics.prd_scores(rows(range(10)), rows(range(10)), **few)
    assert same.f8 > 0.95 and same.f1_8 > 0.95
    lost = metrics.prd_scores(rows(range(10)), rows(range(5)), **few)
    assert lost.f1_8 > 0.9 and lost.f8 < 0.6
    wrong = metrics.prd_scores(rows(range(5)), rows(range(10), 300), **few)
    assert wrong.f8 > 0.9 and wrong.f1_8 < 0.6
    assert metrics.prd_scores(rows(range(5)), rows(range(5, 10)), **few) == (
        pytest.approx(0, abs=0.01),
        pytest.approx(0, abs=0.01),
    )
    with pytest.raises(ValueError, match="clusters needs at least 10 rows of features, not 9"):
        metrics.prd_scores(rows(range(5)), rows(range(5))[:9], **few)


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance])
def test_one_row_is_too_few(distance):
    with pytest.raises(ValueError, match="needs at least 2 rows of features, not 1"):
        distance(np.ones((1, 3)), np.ones((5, 3)))
