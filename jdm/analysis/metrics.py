"""Numbers about images: numpy in, float out. No JAX, no model.

Images are uint8 [N, H, W, C]; distances are Euclidean over all pixels, in units of the full range
(black to white is 1 in each pixel).
"""

import functools

import numpy as np
from jaxtyping import Float, Int, UInt8

Pictures = UInt8[np.ndarray, "_ h w c"]
Labels = Int[np.ndarray, " _"]

# Hidden units of the judge's perceptron: enough to tell digits apart, and few beside the number of
# images that are judged, which have to fill a covariance.
FEATURES = 64


def _flat(images: Pictures) -> Float[np.ndarray, "_ d"]:
    return images.reshape(len(images), -1) / 255.0


class Judge:
    """Classifiers fitted once on the pixels of real images, to judge any number of made ones.

    They know nothing of the network that made those. A support vector classifier (RBF, C = 10) and
    the nearest neighbour are asked for the class; the hidden layer of a perceptron is the features.
    Two judges of the same images judge alike.

    images: uint8 [N, H, W, C], thousands at most. labels: their classes, int [N].
    """

    def __init__(self, images: Pictures, labels: Labels):
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.svm import SVC

        self._real = _flat(images), labels
        judges = {"svc": SVC(C=10), "1-nn": KNeighborsClassifier(n_neighbors=1)}
        self._judges = {name: judge.fit(*self._real) for name, judge in judges.items()}

    @functools.cached_property
    def _perceptron(self):
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((FEATURES,), max_iter=1000, random_state=0).fit(*self._real)

    def agreement(self, images: Pictures, labels: Labels) -> dict[str, float]:
        """Share of the images that get the label given here, by each: {"svc", "1-nn"}."""
        return {
            name: float(np.mean(judge.predict(_flat(images)) == labels))
            for name, judge in self._judges.items()
        }

    def features(self, images: Pictures) -> Float[np.ndarray, "_ d"]:
        """The perceptron's hidden units, after the ReLU. The first call fits it."""
        weights, bias = self._perceptron.coefs_[0], self._perceptron.intercepts_[0]
        return np.maximum(_flat(images) @ weights + bias, 0)


def class_agreement(
    train: Pictures, train_labels: Labels, images: Pictures, labels: Labels
) -> dict[str, float]:
    """Share of the images that a `Judge` of the training images gives the asked label."""
    return Judge(train, train_labels).agreement(images, labels)


def frechet_distance(a: Float[np.ndarray, "_ d"], b: Float[np.ndarray, "_ d"]) -> float:
    """Fréchet distance, squared, of the Gaussians fitted to two sets of features [N, D].

    |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)
                                             Dowson & Landau 1982; of features: Heusel et al. 2017

    In the squared unit of the features, at least 0. The fewer the rows, the larger it comes out, as
    S is estimated: compare distances of equally many rows only. Raises ValueError for fewer than 2.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{min(len(a), len(b))} row of features; a covariance needs at least 2")
    a, b = a.astype(np.float64), b.astype(np.float64)
    s_a, s_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(s_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # Only rounding takes an eigenvalue below 0, or the sum of two Gaussians that are one.
    products = np.linalg.eigvalsh(root @ s_b @ root).clip(0)
    shift = a.mean(axis=0) - b.mean(axis=0)
    spread = np.trace(s_a) + np.trace(s_b) - 2 * np.sqrt(products).sum()
    return float(max(shift @ shift + spread, 0.0))


def nearest_distances(train: Pictures, images: Pictures) -> Float[np.ndarray, " _"]:
    """Distance of each image to the nearest training image."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=1).fit(_flat(train)).kneighbors(_flat(images))[0][:, 0]


def nearest_neighbour_ratio(train: Pictures, test: Pictures, images: Pictures) -> dict[str, float]:
    """Nearest distances over the mean one of real test images: {"mean", "least"}.

    A mean far above 1: the images are not like the data. A least near 0: one is a copy.
    """
    ratios = nearest_distances(train, images) / nearest_distances(train, test).mean()
    return {"mean": float(ratios.mean()), "least": float(ratios.min())}


def within_class_distance(images: Pictures, labels: Labels) -> Float[np.ndarray, " k"]:
    """Mean distance between two different images of one class, for each class that has two."""
    from scipy.spatial.distance import pdist

    classes, counts = np.unique(labels, return_counts=True)
    return np.array([pdist(_flat(images[labels == k])).mean() for k in classes[counts > 1]])


def diversity_ratio(
    images: Pictures, labels: Labels, real: Pictures, real_labels: Labels
) -> dict[str, float]:
    """Within-class distances over those of the real images: {"mean", "least" of the classes}.

    Well below 1: the same picture of a class again and again. Both must show the same classes.
    """
    ours = within_class_distance(images, labels)
    theirs = within_class_distance(real, real_labels)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} classes have two images, but {len(theirs)} real ones do")
    return {"mean": float(ours.mean() / theirs.mean()), "least": float((ours / theirs).min())}
