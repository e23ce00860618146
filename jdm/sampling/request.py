"""What may be asked of a trained model, checked before any work.

Owns labels, seeds and names: from what a user typed to a Request of arrays and of one Method. Every
complaint is a ValueError in one sentence that begins with the argument's name.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt32

from jdm.diffusion.guidance import (
    DEFAULT_SCALES,
    GUIDANCE,
    SCALE_SCHEDULES,
    WITH_BLOCKS,
    WITH_INNER_STEPS,
    block_mask,
)
from jdm.diffusion.process import pick
from jdm.diffusion.samplers import SAMPLERS, THRESHOLDS, timesteps
from jdm.joint import Joint, digest, named, opened
from jdm.nn.unet import block_names

Numbers = Sequence | np.ndarray  # what they must hold is checked, and said in one sentence
CLOSE = 1e-3  # what probabilities may miss 1 by


@dataclasses.dataclass(frozen=True)
class Method:
    """How images are made: all that a compiled program depends on but shapes.

    start: what the first x is: "seed" (noise by seed), "noise" (that is given) or "image" (that is
    given, with noise by seed on it). total: how many times of the chain are left at the start; T,
    but for an image. The rest is described at `jdm.sample`.
    """

    sampler: str = "ddim"
    steps: int | str = 50
    spacing: str = "uniform"
    eta: float = 0.0
    threshold: str = "static"
    guidance: str = "none"
    scale_schedule: str = "constant"
    blocks: tuple[str, ...] | None = None
    inner_steps: int = 1
    film: bool = False
    start: str = "seed"
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A whole request. N images, K classes, M answers.

    labels: as given, [N] or [N, K], or None. targets: what guidance leans toward, [N, M]. seeds:
    [N]. method, scale: how. classifier: whose answers are leaned toward; None is the joint's own;
    classifier_name: what it was called.
    given: noise or images that are started from, float32 [N, H, W, C], or None.
    """

    labels: Num[np.ndarray, "n ..."] | None
    targets: Float[np.ndarray, "n m"]
    seeds: UInt32[np.ndarray, " n"]
    method: Method
    scale: float
    classifier: Joint | None = None
    classifier_name: str | None = None
    given: Float[np.ndarray, "n h w c"] | None = None

    def starting(self, start: str, given: np.ndarray) -> "Request":
        """The same, started from what is given. start: see Method."""
        if len(given) != len(self.seeds):
            raise ValueError(f"{start} is given for {len(given)} images of {len(self.seeds)}")
        method = dataclasses.replace(self.method, start=start)
        return dataclasses.replace(self, method=method, given=given)

    def part(self, rows: slice) -> "Request":
        """Some of its images."""
        arrays = {name: getattr(self, name) for name in ("labels", "targets", "seeds", "given")}
        arrays = {name: x if x is None else x[rows] for name, x in arrays.items()}
        return dataclasses.replace(self, **arrays)

    def settings(self, joint: Joint, **names: Any) -> dict[str, Any]:
        """What to write down of images that the joint makes of it.

        How they were made, digests of what was asked for and of the weights, and names: what the
        model is called and the like.
        """
        settings = dataclasses.asdict(self.method)
        for name in ("film", "start", "total"):
            del settings[name]
        if self.method.blocks is not None:
            settings["blocks"] = list(self.method.blocks)
        asked = [x for x in (self.seeds, self.labels, self.given) if x is not None]
        return {
            **settings,
            "scale": self.scale,
            "classifier": self.classifier_name,
            "images": len(self.seeds),
            "asked": digest(asked),
            "weights": joint.digest,
            "classifier_weights": self.classifier and self.classifier.digest,
            **names,
        }


def check(
    joint: Joint,
    n: int | None = None,
    *,
    labels: Numbers | None = None,
    seeds: Numbers | None = None,
    scale: float | None = None,
    classifier: Joint | str | os.PathLike | None = None,
    batch_size: int | None = None,
    blocks: Sequence[str] | None = None,
    **method: Any,
) -> Request:
    """The request, whole and checked. blocks, method: the fields of Method.

    Raises ValueError, in one sentence that begins with the argument's name.
    """
    n, scale, batch_size = map(_plain, (n, scale, batch_size))
    method = {name: _plain(x) for name, x in method.items()}
    if isinstance(blocks, str):
        raise ValueError(f"blocks={blocks!r} must be a list of names, such as [{blocks!r}]")
    method = Method(blocks=None if blocks is None else tuple(blocks), **method)
    check_numbers(Integral, n=n, batch_size=batch_size, inner_steps=method.inner_steps)
    check_numbers(Real, scale=scale, eta=method.eta)
    name, classifier = named(classifier), None if classifier is None else opened(classifier)
    labels, seeds = _rows(joint, n, labels, seeds)
    _check_method(joint, method)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if method.guidance == "none" and scale is not None:
        raise ValueError(f"scale={scale} goes with a guidance, not 'none'")
    scale = DEFAULT_SCALES[method.guidance] if scale is None else float(scale)
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise ValueError(f"scale={scale} must be finite, as float32")
    if joint.config.loss.terms == "classifier":
        raise ValueError("checkpoint holds a model that was trained to classify alone")
    if method.guidance != "none" and labels is None:
        raise ValueError(f"guidance={method.guidance!r} needs labels")
    if classifier is not None:
        _check_classifier(joint, classifier, method.guidance)
    elif method.guidance != "none" and not has_classifier(joint):
        raise ValueError(
            f"guidance={method.guidance!r} needs a classifier; this model was trained without one"
        )
    if method.guidance == "none" and labels is not None:
        warnings.warn(
            "labels are given, but guidance='none' does not use them; "
            f"known guidance: {', '.join(GUIDANCE)}",
            stacklevel=3,
        )
    targets = _targets(joint, labels, len(seeds))
    return Request(labels, targets, seeds, method, scale, classifier, name)


def check_numbers(kind: type, **given: Any) -> None:
    """Raises ValueError for what is neither None nor of a kind of numbers, Integral or Real."""
    for name, value in given.items():
        if value is not None and not isinstance(value, kind):
            wanted = "whole number" if kind is Integral else "number"
            raise ValueError(f"{name}={value!r} must be a {wanted}")


def has_classifier(joint: Joint) -> bool:
    """Whether the model's head was ever trained."""
    return joint.config.loss.terms != "diffusion" and joint.config.loss.weight != 0


def names_of_blocks(joint: Joint) -> Any:
    """The names of the model's representations, shaped like its features."""
    return block_names(len(joint.model.multipliers), joint.model.blocks)


def _plain(x: Any) -> Any:
    """A number of NumPy or JAX as one of Python, which goes into JSON."""
    return x.item() if getattr(x, "ndim", None) == 0 else x


def _check_method(joint: Joint, method: Method) -> None:
    pick("sampler", method.sampler, SAMPLERS)
    pick("threshold", method.threshold, THRESHOLDS)
    pick("guidance", method.guidance, GUIDANCE)
    pick("scale_schedule", method.scale_schedule, SCALE_SCHEDULES)
    timesteps(joint.diffusion, method.steps, method.spacing, method.total)
    if not 0 <= method.eta <= 1:
        raise ValueError(f"eta={method.eta} must lie in [0, 1]")
    if method.eta and method.sampler != "ddim":
        raise ValueError(f"eta={method.eta} goes with sampler='ddim', not {method.sampler!r}")
    if method.scale_schedule != "constant" and method.guidance == "none":
        raise ValueError(
            f"scale_schedule={method.scale_schedule!r} goes with a guidance, not 'none'"
        )
    if method.inner_steps < 1:
        raise ValueError(f"inner_steps={method.inner_steps} must be at least 1")
    if method.inner_steps > 1 and method.guidance not in WITH_INNER_STEPS:
        raise ValueError(
            f"inner_steps={method.inner_steps} goes with guidance {' or '.join(WITH_INNER_STEPS)}, "
            f"not {method.guidance!r}"
        )
    if method.blocks is not None:
        if method.guidance not in WITH_BLOCKS:
            raise ValueError(
                f"blocks={','.join(method.blocks)} goes with guidance {' or '.join(WITH_BLOCKS)}, "
                f"not {method.guidance!r}"
            )
        block_mask(names_of_blocks(joint), method.blocks)


def _check_classifier(joint: Joint, classifier: Joint, guidance: str) -> None:
    """Raises ValueError where a classifier cannot judge what the joint makes."""
    if guidance != "pixel":
        raise ValueError(f"classifier goes with guidance='pixel', not with {guidance!r}")
    if not has_classifier(classifier):
        raise ValueError("classifier was trained without one: it has nothing to say")
    for name, ours, theirs in (
        ("images of the shape", joint.image_shape, classifier.image_shape),
        ("classes", joint.model.num_classes, classifier.model.num_classes),
        ("several labels", joint.model.multi_label, classifier.model.multi_label),
        (
            "the schedule",
            (joint.diffusion.schedule, joint.diffusion.steps),
            (classifier.diffusion.schedule, classifier.diffusion.steps),
        ),
    ):
        if ours != theirs:
            raise ValueError(f"classifier knows {name} {theirs}; this model has {ours}")


# Labels and seeds --------------------------------------------------------------------------------


def _rows(joint: Joint, n, labels, seeds) -> tuple[np.ndarray | None, np.ndarray]:
    """(labels [N] or [N, K] or None, seeds uint32 [N]), checked and brought to one length."""
    if labels is not None:
        labels = LABELS[joint.model.multi_label](labels, joint.model.num_classes)
    if seeds is not None:
        seeds = whole_numbers("seeds", seeds)
        wrong = seeds[(seeds < 0) | (seeds >= 2**32)]
        if wrong.size:
            raise ValueError(f"seeds hold {wrong[0]}; they must lie in [0, 2**32)")
    if n is None:
        n = next((len(x) for x in (seeds, labels) if x is not None), 1)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    seeds = np.arange(n) if seeds is None else seeds
    if len(seeds) != n:
        raise ValueError(f"seeds are {len(seeds)} for n={n} images; there must be as many")
    if labels is not None:
        if len(labels) not in (1, n):
            raise ValueError(f"labels are {len(labels)} for {n} images; 1 or {n} is allowed")
        labels = np.broadcast_to(labels, (n, *labels.shape[1:])).copy()
    return labels, seeds.astype(np.uint32)


def _classes(labels: Numbers, classes: int) -> np.ndarray:
    """int32 [N], -1 where None was given; or float32 [N, K] of probabilities."""
    if isinstance(labels, Iterable) and not isinstance(labels, np.ndarray):
        labels = [-1 if label is None else label for label in labels]
    labels = _array("labels", labels)
    if labels.ndim == 2:
        return _distributions(labels, classes)
    labels = whole_numbers("labels", labels)
    wrong = labels[(labels < -1) | (labels >= classes)]
    if wrong.size:
        raise ValueError(
            f"labels hold {wrong[0]}; this model knows the classes 0 to {classes - 1}, and -1 is "
            "an image without guidance"
        )
    return labels.astype(np.int32)


def _distributions(rows: np.ndarray, classes: int) -> np.ndarray:
    if rows.shape[1] != classes or not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(
            f"labels of two dimensions are probabilities, floats of the shape (N, {classes}), not "
            f"{rows.dtype}{rows.shape}"
        )
    total = rows.sum(axis=1)
    wrong = ~((rows >= 0).all(axis=1) & ((abs(total - 1) <= CLOSE) | (total == 0)))
    if wrong.any():
        raise ValueError(
            f"labels hold the probabilities {rows[wrong][0].tolist()}; they must not be negative "
            "and sum to 1 (or all be 0, for an image without guidance)"
        )
    return rows.astype(np.float32)


def _attributes(labels: Numbers, classes: int) -> np.ndarray:
    """int8 [N, K] of 1 (on), 0 (off) and -1 (not asked for)."""
    labels = _array("labels", labels)
    if labels.ndim != 2 or labels.shape[1] != classes or not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(
            f"labels of this model, which knows several to an image, have the shape (N, {classes}) "
            f"and hold 1 (on), 0 (off) or -1 (not asked for), not {labels.dtype}{labels.shape}"
        )
    return labels.astype(np.int8)


# What labels may be, by whether a model knows several to an image: (labels, K) -> array [N, ...].
LABELS = {False: _classes, True: _attributes}


def _targets(joint: Joint, labels: np.ndarray | None, n: int) -> Float[np.ndarray, "n m"]:
    """The weights of the answers that are leaned toward; rows of zeros are not guided."""
    classes = joint.model.num_classes
    if labels is None:
        return np.zeros((n, classes * (2 if joint.model.multi_label else 1)), np.float32)
    if joint.model.multi_label:
        return np.concatenate([labels == 1, labels == 0], axis=1).astype(np.float32)
    if labels.ndim == 2:
        return labels
    return (labels[:, None] == np.arange(classes)).astype(np.float32)


def _array(name: str, values: Numbers) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} must be rows of the same length") from None
    if array.ndim == 0:
        raise ValueError(f"{name}={values!r} must be a list, such as [{values!r}]")
    return array


def whole_numbers(name: str, values: Numbers) -> np.ndarray:
    """A list of whole numbers as an array [N]; ValueError for anything else."""
    values = _array(name, values)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{name} must be a list of whole numbers, not {values.dtype}{values.shape}"
        )
    return values
