"""Measures of sets of images, computed with numpy and scikit-learn. No JAX, no model.

Images are uint8 [N, H, W, C]. The distance of two images is Euclidean over all pixels, which are
scaled to [0, 1].
"""

import functools

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial.distance import pdist
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

Pixels = UInt8[np.ndarray, "_ h w c"]
Labels = Int[np.ndarray, " _"]

# Hidden units of the perceptron. Enough to tell digits apart, but few compared with the number of
# samples, because the covariance of the features is estimated from these.
FEATURES = 64


def _flat(images: Pixels) -> Float[np.ndarray, "_ d"]:
    return images.reshape(len(images), -1) / 255.0


class ReferenceClassifiers:
    """Classifiers that score samples, fitted on real images: independent of the model.

    A support vector classifier (RBF kernel, C = 10) and a nearest-neighbour classifier predict
    classes. The hidden layer of a perceptron gives features. All fits are deterministic.

    images: uint8 [N, H, W, C], N up to a few thousand (fits take O(N²) or more). labels: int [N].
    """

    def __init__(self, images: Pixels, labels: Labels):
        self._real = _flat(images), labels
        unfitted = {"svc": SVC(C=10), "1-nn": KNeighborsClassifier(n_neighbors=1)}
        self._classifiers = {name: one.fit(*self._real) for name, one in unfitted.items()}

    @functools.cached_property
    def _perceptron(self):
        return MLPClassifier((FEATURES,), max_iter=1000, random_state=0).fit(*self._real)

    def agreement(self, images: Pixels, labels: Labels) -> dict[str, float]:
        """The accuracy of "svc" and of "1-nn" on these images, in [0, 1]."""
        return {name: one.score(_flat(images), labels) for name, one in self._classifiers.items()}

    def features(self, images: Pixels) -> Float[np.ndarray, "_ d"]:
        """The hidden units of the perceptron after the ReLU; it is fitted at the first call."""
        weights, bias = self._perceptron.coefs_[0], self._perceptron.intercepts_[0]
        return np.maximum(_flat(images) @ weights + bias, 0)


def frechet_distance(a: Float[np.ndarray, "_ d"], b: Float[np.ndarray, "_ d"]) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features [N, D].

    |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)
                                    Dowson & Landau 1982; for features of images Heusel et al. 2017

    At least 0, in squared units of the features. It is biased upward, more so for fewer rows, so
    compare only distances from equally many rows. Raises ValueError for fewer than 2 rows.
    """
    if (fewest := min(len(a), len(b))) < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, not {fewest}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    s_a, s_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(s_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # Clipped here and below, because rounding can make zeros negative.
    products = np.linalg.eigvalsh(root @ s_b @ root).clip(0)
    shift = a.mean(axis=0) - b.mean(axis=0)
    spread = np.trace(s_a) + np.trace(s_b) - 2 * np.sqrt(products).sum()
    return float(max(shift @ shift + spread, 0.0))


def nearest_distances(train: Pixels, images: Pixels) -> Float[np.ndarray, " _"]:
    """The distance of each image to the nearest training image."""
    return NearestNeighbors(n_neighbors=1).fit(_flat(train)).kneighbors(_flat(images))[0][:, 0]


def nearest_neighbour_ratio(train: Pixels, test: Pixels, images: Pixels) -> dict[str, float]:
    """Distances to the nearest training image, divided by their mean over the test images.

    {"mean", "least"} over the images. If the mean is far above 1, the images do not resemble the
    data. If the least is near 0, an image is a copy of a training image.
    """
    ratios = nearest_distances(train, images) / nearest_distances(train, test).mean()
    return {"mean": float(ratios.mean()), "least": float(ratios.min())}


def within_class_distance(images: Pixels, labels: Labels) -> Float[np.ndarray, " k"]:
    """The mean distance between two images of a class, for each class of at least two images."""
    classes, counts = np.unique(labels, return_counts=True)
    return np.array([pdist(_flat(images[labels == k])).mean() for k in classes[counts > 1]])


def diversity_ratio(
    images: Pixels, labels: Labels, real: Pixels, real_labels: Labels
) -> dict[str, float]:
    """Within-class distances, divided by those of real images: {"mean", "least"} over the classes.

    Well below 1, the images of a class are too similar. Raises ValueError unless both sets have
    the same number of classes with at least two images.
    """
    found = within_class_distance(images, labels)
    expected = within_class_distance(real, real_labels)
    if len(found) != len(expected):
        counts = f"{len(found)}, and {len(expected)} for real images"
        raise ValueError(f"the numbers of classes with two or more images differ: {counts}")
    return {"mean": float(found.mean() / expected.mean()), "least": float((found / expected).min())}
