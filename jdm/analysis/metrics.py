"""Measures of sets of images, computed with numpy and scikit-learn. No JAX, no model.

scikit-learn and scipy are imported where they are used: that takes seconds, and every training
imports this module.

Of features [N, D], from any extractor (jdm.analysis.extractors):

    Fréchet distance          of two Gaussians             Heusel et al. 2017
    kernel distance (KID)     of two distributions         Bińkowski et al. 2018
    precision and recall      by nearest neighbours        Kynkäänniemi et al. 2019
    F8 and F1/8               of the curve of precision and recall by clusters (PRD)
                                                           Sajjadi et al. 2018

The two kinds of precision and recall are different measures, and share no name here.

Of images, uint8 [N, H, W, C]: distances to the nearest image and within a class. The distance of
two images is Euclidean over all pixels, which are scaled to [0, 1].
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from threadpoolctl import threadpool_limits

Pixels = UInt8[np.ndarray, "_ h w c"]
Labels = Int[np.ndarray, " _"]

BLOCK = 4096  # rows that are compared with all others at once
CLUSTERS = 20  # of the PRD curve, as published


def flat(images: Pixels) -> Float[np.ndarray, "_ d"]:
    """The pixels of each image as one row, in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def frechet_distance(a: Float[np.ndarray, "_ d"], b: Float[np.ndarray, "_ d"]) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features [N, D].

    |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)
                                    Dowson & Landau 1982; for features of images Heusel et al. 2017

    At least 0, in squared units of the features. It is biased upward, more so for fewer rows, so
    compare only distances from equally many rows. Raises ValueError for fewer than 2 rows.
    """
    _check_rows(a, b, 2, "a covariance")
    a, b = a.astype(np.float64), b.astype(np.float64)
    s_a, s_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(s_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # Clipped here and below, because rounding can make zeros negative.
    products = np.linalg.eigvalsh(root @ s_b @ root).clip(0)
    shift = a.mean(axis=0) - b.mean(axis=0)
    spread = np.trace(s_a) + np.trace(s_b) - 2 * np.sqrt(products).sum()
    return float(max(shift @ shift + spread, 0.0))


def kernel_distance(a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "n d"]) -> float:
    """Kernel distance (KID): the unbiased estimate of MMD² with the kernel (x·y / D + 1)³.

    mean of k(a, a') over pairs a ≠ a' + mean of k(b, b') over pairs b ≠ b' - 2 mean of k(a, b)
                                                        Bińkowski et al. 2018, equation 4

    It has no bias, whatever the numbers of rows, so it may be a little below 0. Memory is that of
    blocks of rows. Raises ValueError for fewer than 2 rows.
    """
    _check_rows(a, b, 2, "a kernel distance")
    sums = _kernel_sums(a, a)[1] / (len(a) * (len(a) - 1))
    sums += _kernel_sums(b, b)[1] / (len(b) * (len(b) - 1))
    return float(sums - 2 * _kernel_sums(a, b)[0] / (len(a) * len(b)))


def _kernel_sums(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(the sum of the kernel over all pairs of rows, the same without the pairs (i, i))."""
    a, b, total, diagonal = a.astype(np.float64), b.astype(np.float64), 0.0, 0.0
    for start in range(0, len(a), BLOCK):
        kernel = (a[start : start + BLOCK] @ b.T / a.shape[1] + 1) ** 3
        total += kernel.sum()
        diagonal += np.diagonal(kernel, start).sum()
    return total, total - diagonal


def kernel_distance_of_subsets(
    a: Float[np.ndarray, "m d"],
    b: Float[np.ndarray, "n d"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """(mean, standard deviation) of kernel distances of random subsets of `size` rows.

    The mean estimates what `kernel_distance` of all rows does, in less time for many rows. Other
    libraries report it, with these defaults. Raises ValueError for fewer rows than `size`.
    """
    _check_rows(a, b, size, "a subset")
    rng = np.random.default_rng(seed)

    def subset(x: np.ndarray) -> np.ndarray:
        return x[rng.choice(len(x), size, replace=False)]

    found = [kernel_distance(subset(a), subset(b)) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found))


class PrecisionRecall(NamedTuple):
    """precision, recall: in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    real: Float[np.ndarray, "m d"], generated: Float[np.ndarray, "n d"], k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall, by nearest neighbours.

    precision: the share of generated rows within the manifold of the real ones; recall: the share
    of real rows within that of the generated ones. The manifold of a set is the union of a ball
    around each row, with the distance to its k-th nearest neighbour in the set as the radius.
                                                        Kynkäänniemi et al. 2019, section 2

    Both depend on the numbers of rows, so compare only sets of equal sizes. Memory is that of
    blocks of rows. Raises ValueError for k or fewer rows.
    """
    _check_rows(real, generated, k + 1, "precision and recall")
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    return PrecisionRecall(_share_within(generated, real, k), _share_within(real, generated, k))


def _share_within(rows: np.ndarray, of: np.ndarray, k: int) -> float:
    """The share of rows that are within the manifold of the set `of`."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(of)
    radii = neighbours.kneighbors()[0][:, -1]  # a row is not its own neighbour

    def within(distances: np.ndarray, start: int) -> np.ndarray:
        return (distances <= radii).any(axis=1)

    found = pairwise_distances_chunked(rows, of, reduce_func=within, working_memory=256)
    return float(np.concatenate(list(found)).mean())


class PrdScores(NamedTuple):
    """f8: weighs recall 8 times as much as precision. f1_8: the other way round. Both in [0, 1]."""

    f8: float
    f1_8: float


def prd_scores(
    real: Float[np.ndarray, "m d"],
    generated: Float[np.ndarray, "n d"],
    clusters: int = CLUSTERS,
    runs: int = 10,
    seed: int = 0,
) -> PrdScores:
    """F8 and F1/8 of the curve of precision and recall for distributions (PRD).

    Both sets are clustered together by k-means, and the curve is that of the two histograms over
    the clusters, the mean of some runs.            Sajjadi et al. 2018, algorithm 1 and section 4.1

    The sets count the same: of the larger, as many rows as the smaller has are drawn. Raises
    ValueError for fewer rows than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    _check_rows(real, generated, clusters, "clusters")
    rng, count = np.random.default_rng(seed), min(len(real), len(generated))
    drawn = [x[rng.choice(len(x), count, replace=False)] for x in (real, generated)]
    rows, curves = np.concatenate(drawn).astype(np.float64), []
    for run in range(runs):
        # One thread: the batches are small, and threads wait for each other after each of them.
        with threadpool_limits(1):
            fitted = MiniBatchKMeans(clusters, n_init=10, random_state=seed + run).fit(rows)
        p, q = (
            np.bincount(labels, minlength=clusters) / count
            for labels in np.split(fitted.labels_, 2)
        )
        curves.append(prd_curve(p, q))
    precision, recall = np.mean(curves, axis=0)
    return PrdScores(*(_largest_f(precision, recall, beta) for beta in (8.0, 1 / 8)))


def prd_curve(
    real: Float[np.ndarray, " k"], generated: Float[np.ndarray, " k"], angles: int = 1001
) -> Float[np.ndarray, "2 angles"]:
    """(precision, recall) along the curve of two histograms that sum to 1.

    precision(λ) = Σ min(λ p, q), recall(λ) = precision(λ) / λ, p of real images and q of generated
    ones; λ = tan(angle) for angles between 0 and π/2.      Sajjadi et al. 2018, equation 2
    """
    slopes = np.tan(np.linspace(1e-10, np.pi / 2 - 1e-10, angles))
    precision = np.minimum(slopes[:, None] * real, generated).sum(axis=1)
    return np.stack([precision, precision / slopes]).clip(0, 1)


def _largest_f(precision: np.ndarray, recall: np.ndarray, beta: float) -> float:
    """The largest F_beta along a curve."""
    below = beta**2 * precision + recall
    return float(((1 + beta**2) * precision * recall / np.maximum(below, 1e-10)).max())


def _check_rows(a: np.ndarray, b: np.ndarray, least: int, what: str) -> None:
    """Raises ValueError where a set has too few rows."""
    if (fewest := min(len(a), len(b))) < least:
        raise ValueError(f"{what} needs at least {least} rows of features, not {fewest}")


def nearest_distances(train: Pixels, images: Pixels) -> Float[np.ndarray, " _"]:
    """The distance of each image to the nearest training image.

    Memory is that of blocks of training images.
    """
    from sklearn.neighbors import NearestNeighbors

    rows, least = flat(images), np.full(len(images), np.inf)
    for start in range(0, len(train), BLOCK):
        fitted = NearestNeighbors(n_neighbors=1).fit(flat(train[start : start + BLOCK]))
        least = np.minimum(least, fitted.kneighbors(rows)[0][:, 0])
    return least


def nearest_neighbour_ratio(train: Pixels, test: Pixels, images: Pixels) -> dict[str, float]:
    """Distances to the nearest training image, divided by their mean over the test images.

    {"mean", "least"} over the images. If the mean is far above 1, the images do not resemble the
    data. If the least is near 0, an image is a copy of a training image.
    """
    ratios = nearest_distances(train, images) / nearest_distances(train, test).mean()
    return {"mean": float(ratios.mean()), "least": float(ratios.min())}


def within_class_distance(images: Pixels, labels: Labels) -> dict[int, float]:
    """{class: the mean distance between two of its images}, of each class of at least two images;
    the label -1 is no class."""
    from scipy.spatial.distance import pdist

    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    return {int(k): float(pdist(flat(images[labels == k])).mean()) for k in classes[counts > 1]}


def diversity_ratio(
    images: Pixels, labels: Labels, real: Pixels, real_labels: Labels
) -> dict[str, float]:
    """Within-class distances, divided by those of real images: {"mean", "least"} over the classes.

    Well below 1, the images of a class are too similar. Classes without two images in both sets
    are left out. Raises ValueError where no class is left.
    """
    found = within_class_distance(images, labels)
    expected = within_class_distance(real, real_labels)
    if not (both := sorted(found.keys() & expected.keys())):
        raise ValueError("no class has two or more images in both sets")
    ours, theirs = (np.array([one[k] for k in both]) for one in (found, expected))
    return {"mean": float(ours.mean() / theirs.mean()), "least": float((ours / theirs).min())}
