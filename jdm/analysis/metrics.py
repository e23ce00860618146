"""Numbers about images: numpy in, float out. No JAX, no model.

Images are uint8 [N, H, W, C]; distances are Euclidean over all pixels, in units of the full range
(black to white is 1 in each pixel).
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

Pictures = UInt8[np.ndarray, "_ h w c"]
Labels = Int[np.ndarray, " _"]


def _flat(images: Pictures) -> Float[np.ndarray, "_ d"]:
    return images.reshape(len(images), -1) / 255.0


def class_agreement(
    train: Pictures, train_labels: Labels, images: Pictures, labels: Labels
) -> dict[str, float]:
    """Share of the images that independent judges give the asked label: {"svc", "1-nn"}.

    The judges are fitted on the pixels of the training images: a support vector classifier (RBF,
    C = 10) and the nearest neighbour. They know nothing of the network that made the images.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    judges = {"svc": SVC(C=10), "1-nn": KNeighborsClassifier(n_neighbors=1)}
    return {
        name: float(np.mean(judge.fit(_flat(train), train_labels).predict(_flat(images)) == labels))
        for name, judge in judges.items()
    }


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
