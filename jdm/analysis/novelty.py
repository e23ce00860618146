"""Novelty: how far an image lies from the training images, in the joint model's own features.

    distance = Euclidean distance to the k-th nearest training image       Sun et al. 2022

The features are the spatial means of the representations that the classifier reads, of the clean
image. Clean, because noise would only blur them; those representations, because they are trained to
hold what tells images apart, and not only what the last layer needs for the classes. Each feature
is standardised by its mean and standard deviation over the training images.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jdm.analysis.features import features
from jdm.analysis.shares import in_shares
from jdm.data.labels import random_order
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint
from jdm.nn.unet import block_names

NEIGHBOURS = 5  # k: few, since some regions hold few images; more than 1, since some are outliers
IMAGES = 10_000  # training images at most, because time and memory grow with their number
LEVEL = 0  # t: clean images


@dataclasses.dataclass(frozen=True)
class Novelty:
    """Distances to training images; made by `fit`.

    training: the distances of the training images themselves, ascending [M]. Each is to its k-th
    nearest among the others, so that they compare with those of images that are not among them.
    """

    joint: Joint
    training: Float[np.ndarray, " m"]
    _mean: Float[np.ndarray, " d"] = dataclasses.field(repr=False)
    _scale: Float[np.ndarray, " d"] = dataclasses.field(repr=False)
    _neighbours: Any = dataclasses.field(repr=False)
    _batch_size: int
    _shared: bool

    @classmethod
    def fit(
        cls,
        joint: Joint,
        train_images: UInt8[np.ndarray, "n h w c"],
        *,
        seed: int = 0,
        batch_size: int = 256,
        shared: bool = False,
    ) -> "Novelty":
        """The distances to these images, or to 10,000 of them, drawn by the seed where there are
        more. batch_size: images in one forward pass. shared: whether features, also those of
        `distances`, are computed as `shares.in_shares` says.

        Raises InvalidValue for fewer than k + 1 = 6 images, and for images that the model does not
        take.
        """
        from sklearn.neighbors import NearestNeighbors

        if len(train_images) <= NEIGHBOURS:
            least = f"are {len(train_images)}; there must be more than {NEIGHBOURS}"
            raise InvalidValue("train_images", NO_VALUE, least)
        rows = np.sort(random_order(len(train_images), seed)[:IMAGES])
        found = _features(joint, train_images[rows], batch_size, shared)
        mean, scale = found.mean(axis=0), found.std(axis=0)
        scale[scale == 0] = 1  # a feature that is the same for all images
        neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS).fit((found - mean) / scale)
        training = np.sort(neighbours.kneighbors()[0][:, -1])  # without arguments: leave one out
        return cls(joint, training, mean, scale, neighbours, batch_size, shared)

    def distances(self, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, " n"]:
        """The distance of each image, float64 [N]. Of a training image it is smaller than in
        `training`, because the image counts as its own neighbour.

        Raises InvalidValue for images that the model does not take.
        """
        found = _features(self.joint, images, self._batch_size, self._shared)
        if not len(found):
            return np.zeros(0)
        return self._neighbours.kneighbors((found - self._mean) / self._scale)[0][:, -1]

    def percentiles(self, distances: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The share of training images that are at most as far, in percent [N]."""
        return 100 * np.searchsorted(self.training, distances, side="right") / len(self.training)

    def threshold(self, share: float = 0.99) -> float:
        """The distance within which this share of the training images lies, share in [0, 1]."""
        return float(np.quantile(self.training, share))


def _features(joint: Joint, images, batch_size: int, shared: bool) -> Float[np.ndarray, "n d"]:
    """float64, because distances are computed from squares that nearly cancel."""
    model = joint.model
    names = block_names(len(model.multipliers), model.blocks)
    blocks = (*names.skips, names.mid)

    def values(rows: slice) -> np.ndarray:
        return features(joint, images[rows], LEVEL, blocks, batch_size=batch_size).values

    return in_shares(values, len(images), shared).astype(np.float64)
