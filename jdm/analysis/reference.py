"""Reference classifiers: they score samples, and are independent of the model that drew them.

They are fitted on real training images alone. Which ones depends on the data:

- images of up to 16 pixels a side, with one label each: a support vector classifier and the nearest
  neighbour, on pixels; features are the hidden units of a perceptron;
- larger images, and images with several attributes: a network of jdm's own, trained to classify
  alone. It is trained once for each data set, and kept as a work folder that `jdm.load` reads.

Processes that evaluate together fit and apply classifiers on pixels each for itself. The network is
trained by process 0, which sends its weights to the others, and they share the images.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from jdm import distributed
from jdm.analysis.metrics import Labels, Pixels, flat
from jdm.analysis.shares import in_shares
from jdm.config import check_config, config_from_dict, config_to_dict
from jdm.configs import base
from jdm.convert import write_work_folder
from jdm.data.datasets import DATASETS
from jdm.data.pipeline import train_batches
from jdm.data.splits import Split
from jdm.diffusion.process import Diffusion, to_floats
from jdm.errors import NO_VALUE, Failure, InvalidValue
from jdm.files import whole_folder
from jdm.joint import Joint, abstract_weights, classify, digest, load
from jdm.mesh import in_batches, local_mesh, make_mesh, replicated, to_global
from jdm.messages import say
from jdm.nn.model import JointModel, make_model
from jdm.numerics import fixed_flags, key_of
from jdm.tracking import Progress
from jdm.training.build import build

SIDE = 16  # of the largest images that are classified by their pixels
# Hidden units of the perceptron. Enough to tell digits apart, but few compared with the number of
# samples, because the covariance of the features is estimated from these.
FEATURES = 64

# The network's training: at 28×28 a quarter of an hour on two CPU cores, at most.
BATCH, MOST_STEPS, LEAST_STEPS, EPOCHS = 32, 8000, 1000, 20
MANY = 10  # passes over the images, from which on they are augmented
LARGEST_LAST = 8  # the side length of the last level is at most this, where the size allows it


class Reference(abc.ABC):
    """The reference classifiers of a data set, and features of images."""

    @property
    @abc.abstractmethod
    def predictors(self) -> Mapping[str, Callable[[Pixels], Labels]]:
        """{name: a function from uint8 images [N, H, W, C] to classes int [N]}; {} where images
        have several attributes."""

    def agreement(self, images: Pixels, labels: Labels) -> dict[str, float]:
        """The share of the images that each predictor takes for its label, in [0, 1]."""
        found = self.predictors.items()
        return {name: float(np.mean(predict(images) == labels)) for name, predict in found}

    @abc.abstractmethod
    def classify(self, images: Pixels) -> np.ndarray:
        """Class probabilities float [N, K], those of attributes too; or classes int [N] where the
        classifier has no probabilities."""

    @abc.abstractmethod
    def features(self, images: Pixels) -> Float[np.ndarray, "n d"]:
        """float32 [N, D]."""

    @property
    @abc.abstractmethod
    def dimension(self) -> int:
        """D of the features."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """16 hexadecimal digits that identify the weights that the features depend on."""


def make_reference(
    joint: Joint, train: Split, cache: Path, batch_size: int, shared: bool = False
) -> Reference:
    """The reference classifiers of a model's data set.

    train: its training split; images without a label are left out. cache: the folder that keeps a
    trained network. batch_size: images that the network classifies at once. shared: whether the
    processes of a run, which all call this together and then the Reference, do so as one.

    Raises InvalidValue for a split without labels.
    """
    multi_label = joint.model.multi_label
    labelled = train.labels.reshape(len(train.labels), -1).max(axis=1) >= 0
    if not labelled.any():
        raise InvalidValue("split", train.name, "has no labelled image for reference classifiers")
    if not labelled.all():
        train = Split(train.images[labelled], train.labels[labelled], train.name)
    if joint.model.image_size > SIDE or multi_label:
        return ReferenceNetwork(network(joint, train, cache, shared), batch_size, shared)
    return ReferenceClassifiers(train.images, train.labels)


class ReferenceClassifiers(Reference):
    """Classifiers of small images by their pixels, fitted on real images.

    A support vector classifier (RBF kernel, C = 10) and a nearest-neighbour classifier predict
    classes. The hidden layer of a perceptron gives features. All fits are deterministic.

    images: uint8 [N, H, W, C], N up to a few thousand (fits take O(N²) or more). labels: int [N].
    """

    dimension = FEATURES

    def __init__(self, images: Pixels, labels: Labels):
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.svm import SVC

        self._real = flat(images), labels
        unfitted = {"svc": SVC(C=10), "1-nn": KNeighborsClassifier(n_neighbors=1)}
        self._classifiers = {name: one.fit(*self._real) for name, one in unfitted.items()}

    @functools.cached_property
    def _perceptron(self) -> Any:
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((FEATURES,), max_iter=1000, random_state=0).fit(*self._real)

    @property
    def predictors(self) -> dict[str, Callable[[Pixels], Labels]]:
        """{"svc", "1-nn"}: functions from images to classes."""

        def predictor(one: Any) -> Callable[[Pixels], Labels]:
            return lambda images: one.predict(flat(images))

        return {name: predictor(one) for name, one in self._classifiers.items()}

    def classify(self, images: Pixels) -> Labels:
        """The classes that the support vector classifier sees, int [N]."""
        return self.predictors["svc"](images)

    def features(self, images: Pixels) -> Float[np.ndarray, "_ d"]:
        """The hidden units of the perceptron after the ReLU; it is fitted at the first call."""
        weights, bias = self._perceptron.coefs_[0], self._perceptron.intercepts_[0]
        return np.maximum(flat(images) @ weights + bias, 0).astype(np.float32)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the weights of the perceptron's hidden layer."""
        return digest([self._perceptron.coefs_[0], self._perceptron.intercepts_[0]])


# The network --------------------------------------------------------------------------------------


def network_config(model: JointModel, count: int, flips: bool) -> ConfigDict:
    """The config of the reference network for images as the model's.

    count: the number of training images. flips: whether a mirrored image has the same class.
    """
    config, sides = base.get_config(), [model.image_size]
    while sides[-1] > LARGEST_LAST and sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    shared = ("image_size", "image_channels", "num_classes", "multi_label")
    config.model.update({name: getattr(model, name) for name in shared})
    multipliers = tuple(min(2**level, 4) for level in range(len(sides)))
    # Dropout draws a random number for every activation, which costs more than it helps here.
    config.model.update(channels=16, multipliers=multipliers, blocks=1, attention=(), dropout=0.0)
    steps = min(MOST_STEPS, max(LEAST_STEPS, EPOCHS * count // BATCH))
    policy = "natural" if flips else "digits" if steps * BATCH > MANY * count else "none"
    config.loss.update(terms=("classifier",), classify="clean", weight=1.0, augment=policy)
    config.data.batch_size = BATCH
    config.train.update(steps=steps, ema_decay=0.995)
    warmup = dict(schedule="cosine", warmup_steps=min(100, steps // 10))
    config.optim.update(lr=1.5e-3, weight_decay=0.05, **warmup)
    check_config(config)
    return config


@fixed_flags()
def network(joint: Joint, train: Split, cache: Path, shared: bool = False) -> Joint:
    """The reference network of a data set: from the cache, or trained and kept there. shared: all
    processes of a run, which call this together, have that of process 0.

    It depends on the training images, their labels and the config alone: not on the model, nor on
    the number of devices, of which it uses one.
    """
    name = joint.config.data.name
    # A data set outside the table may hold anything, and so its images are not mirrored.
    flips = name in DATASETS and DATASETS[name].flips
    config = network_config(joint.model, len(train.images), flips)
    values = config_to_dict(config)
    config_digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    side, data = joint.model.image_size, digest([train.images, train.labels])
    folder = cache / f"reference-{side}x{side}-{data}-{config_digest}"
    values["data"] |= {"name": name, "classes": tuple(joint.config.data.classes)}

    def kept() -> Joint:
        if not folder.exists():
            weights = _trained(config, train, folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                with whole_folder(folder, f"{uuid.uuid4().hex[:8]}.part") as unfinished:
                    steps, dataset = config.train.steps, dict(joint.dataset)
                    write_work_folder(unfinished, steps, weights, values, dataset)
            except OSError:
                if not folder.exists():  # otherwise another process has trained the same network
                    raise
        return load(folder)

    if not shared or distributed.count() == 1:
        return kept()
    model, mesh = make_model(config.model, config.exec), local_mesh()
    weights = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_weights(model, mesh))
    if distributed.is_main():
        with distributed.only_main():
            weights = kept().weights
    weights = jax.device_put(distributed.from_main(weights), replicated(mesh))
    diffusion, rest = Diffusion(**config.diffusion), (dict(joint.dataset), config.train.steps)
    return Joint(config_from_dict(values), model, diffusion, weights, *rest)


def _trained(config: ConfigDict, train: Split, folder: Path) -> Any:
    """The EMA of the weights after all steps."""
    rows, steps = config.data.batch_size, config.train.steps
    count = f"{len(train.images):,} training images"
    say(f"training a reference classifier on {count}, once; it will be kept in {folder}")
    mesh, root, started = make_mesh(jax.local_devices()[:1]), key_of(config.seed), time.monotonic()
    run = build(config, mesh)
    state = run.init(root)
    batches = train_batches(train.images, train.labels, batch_size=rows, seed=config.seed)
    with Progress(steps * rows, "training the reference classifier", "images") as progress:
        for _ in range(steps):
            state, metrics = run.step(state, to_global(next(batches), mesh), root)
            jax.block_until_ready(metrics)  # so that the progress is that of the device
            progress.advance(rows)
    if not np.isfinite(metrics["loss"][0]):
        raise Failure(f"the loss of the reference classifier is not finite after {steps} steps")
    say(f"trained the reference classifier in {time.monotonic() - started:.0f} s")
    return jax.device_get(state.ema)


@dataclasses.dataclass(frozen=True)
class ReferenceNetwork(Reference):
    """A network as a Reference; its features are the hidden units of its head."""

    joint: Joint
    batch_size: int
    shared: bool = False  # see make_reference

    @property
    def dimension(self) -> int:
        return self.joint.model.head_width

    @property
    def digest(self) -> str:
        return self.joint.digest

    @property
    def predictors(self) -> dict[str, Callable[[Pixels], Labels]]:
        if self.joint.model.multi_label:
            return {}
        return {"network": lambda images: self.classify(images).argmax(axis=1)}

    def classify(self, images: Pixels) -> Float[np.ndarray, "n k"]:
        def probabilities(rows: slice) -> np.ndarray:
            return np.asarray(classify(self.joint, images[rows], batch_size=self.batch_size))

        return in_shares(probabilities, len(images), self.shared)

    def features(self, images: Pixels) -> Float[np.ndarray, "n d"]:
        def hidden(weights: Any, batch: Any) -> Any:
            return _hidden(self.joint.model, weights, to_floats(batch))

        return of_images(hidden, self.joint.weights, images, self.batch_size, self.shared)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: JointModel, weights: Any, x: Any) -> Any:
    """The hidden units of the normalised head of clean images, float32 [B, D]."""

    def is_hidden(module: nn.Module, method: str) -> bool:
        return module.path == ("head", "norm") and method == "__call__"

    def apply(model: JointModel, x: Any) -> Any:
        t = jnp.zeros(len(x), jnp.int32)
        return model.classify(model.encode(x, t), t)

    _, state = model.apply(
        weights, x, method=apply, capture_intermediates=is_hidden, mutable="intermediates"
    )
    (normalised,) = state["intermediates"]["head"]["norm"]["__call__"]
    return nn.silu(normalised)


def of_images(
    function: Callable,
    weights: Any,
    images: Pixels,
    batch_size: int,
    shared: bool = False,
) -> Float[np.ndarray, "n d"]:
    """What a function of (weights, images [B, H, W, C]) computes for all images; see
    `mesh.in_batches`. shared: see `shares.in_shares`."""
    if not len(images):
        raise InvalidValue("images", NO_VALUE, "are none; there must be at least 1")

    def results(rows: slice) -> np.ndarray:
        size = min(batch_size, rows.stop - rows.start)
        return in_batches(function, weights, [images[rows]], size).astype(np.float32)

    return in_shares(results, len(images), shared)
