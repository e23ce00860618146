"""A request for images: the arguments of `jdm.sample` and its relatives, checked."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt32

from jdm.diffusion.guidance import GUIDANCE, block_mask, chosen
from jdm.diffusion.method import Method, check_takes
from jdm.diffusion.samplers import SAMPLERS, timesteps
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint, as_joint, check_trained, digest, make_network, name_of
from jdm.options import POSITIVE, WHOLE, Option, plain_number
from jdm.sampling.labels import Numbers, check_rows, target_weights

_COUNT = Option(None, "a number of images", POSITIVE, kind=WHOLE)


class Recipe(NamedTuple):
    """What a compiled sampling program depends on, apart from the models and shapes.

    method: without its scale, which is an argument of the program. start: what sampling starts
    from: "seed" (noise drawn from the seed), "noise" (a given x_T) or "image" (a given image, to
    which noise drawn from the seed is added). total: sampling starts at the noise level t = total -
    1; None is T. trajectory: whether the estimates of x0 at every step are returned too.
    """

    method: Method
    start: str = "seed"
    total: int | None = None
    trajectory: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for N images.

    labels, seeds: see Samples. targets: see `target_weights`. scale: the guidance scale.
    classifier: the guidance classifier, and classifier_name its path; None is the joint's own.
    given: x_T or images in [-1, 1] to start from, float32 [N, H, W, C]; None for noise by seed.
    class_names: see Joint.
    """

    labels: Num[np.ndarray, "n ..."] | None
    targets: Float[np.ndarray, "n m"]
    seeds: UInt32[np.ndarray, " n"]
    recipe: Recipe
    scale: float
    classifier: Joint | None = None
    classifier_name: str | None = None
    given: Float[np.ndarray, "n h w c"] | None = None
    class_names: tuple[str, ...] = ()

    def starting(self, start: str, given: np.ndarray) -> "Request":
        """The same request, starting from given noise or images; see Recipe."""
        if len(given) != len(self.seeds):
            said = f"is given for {len(given)} images of {len(self.seeds)}"
            raise InvalidValue(start, NO_VALUE, said)
        return dataclasses.replace(self, recipe=self.recipe._replace(start=start), given=given)

    def part(self, rows: slice) -> "Request":
        """The request for some of its images."""
        names = ("labels", "targets", "seeds", "given")
        arrays = {name: x[rows] for name in names if (x := getattr(self, name)) is not None}
        return dataclasses.replace(self, **arrays)

    def settings(self, joint: Joint, **names: Any) -> dict[str, Any]:
        """How the images are generated, ready for JSON; saved with them.

        Digests stand for the arrays and weights. names: further entries, such as the model's path.
        """
        arrays = [x for x in (self.seeds, self.labels, self.given) if x is not None]
        return {
            **self.recipe.method.settings(),
            "scale": self.scale,
            "classifier": self.classifier_name,
            "images": len(self.seeds),
            "request": digest(arrays),
            "weights": joint.digest,
            "classifier_weights": self.classifier and self.classifier.digest,
            "dtype": joint.config.exec.dtype,
            **names,
        }


def from_noise(method: Method) -> Method:
    """The method for a given x_T: by default with a sampler that draws no noise of its own."""
    return dataclasses.replace(method, sampler=method.sampler or "ddim")


def check_request(
    joint: Joint,
    n: int | None = None,
    *,
    method: Method,
    labels: Numbers | None = None,
    seeds: Numbers | None = None,
    classifier: Joint | str | os.PathLike | None = None,
    total: int | None = None,
    trajectory: bool = False,
    batch_size: int | None = None,
) -> Request:
    """The checked request. total, trajectory: see Recipe; the rest: see `jdm.sample`.

    Raises InvalidValue, naming the argument.
    """
    n = plain_number(n)
    _COUNT.check("n", n)
    _COUNT.check("batch_size", batch_size)
    classifier_name = None if classifier is None else name_of(classifier)
    classifier = None if classifier is None else as_joint(classifier, "classifier")
    model = joint.model
    labels, seeds = check_rows(n, labels, seeds, model.num_classes, model.multi_label)
    method = chosen(method, labels is not None, classifier is not None)
    guidance = GUIDANCE[method.guidance]
    check_takes(method, "sampler", SAMPLERS)
    check_takes(method, "guidance", GUIDANCE)
    timesteps(joint.diffusion, method.steps, method.spacing, total)
    block_mask(make_network(model, joint.diffusion, joint.weights).block_names, method.blocks)
    _check_models(joint, classifier, method, labels is not None)
    scale = guidance.default_scale if method.scale is None else float(method.scale)
    targets = target_weights(labels, len(seeds), model.num_classes, model.multi_label)
    recipe = Recipe(dataclasses.replace(method, scale=None), "seed", total, trajectory)
    names = joint.class_names
    whole = (labels, targets, seeds, recipe, scale, classifier, classifier_name)
    return Request(*whole, class_names=names)


def _check_models(joint: Joint, classifier: Joint | None, method: Method, labelled: bool) -> None:
    """Raises InvalidValue where the models lack what the method needs."""
    takes, guidance = GUIDANCE[method.guidance].takes, method.guidance
    check_trained(joint, "diffusion")
    if "labels" in takes and not labelled:
        raise InvalidValue("guidance", guidance, "needs labels")
    if classifier is not None:
        _check_classifier(joint, classifier, guidance)
        names = joint.class_names, classifier.class_names
        if all(names) and names[0] != names[1]:
            warnings.warn(
                f"the guidance classifier knows the classes {', '.join(names[1])}, and the model "
                f"{', '.join(names[0])}; labels are numbers of the classifier's",
                stacklevel=4,
            )
    elif "labels" in takes and not joint.has_classifier:
        said = "needs a classifier; this model was trained without one"
        raise InvalidValue("guidance", guidance, said)
    if labelled and "labels" not in takes:
        warnings.warn(
            f"labels are given, but guidance={guidance!r} does not use them; "
            f"known guidance: {', '.join(GUIDANCE)}",
            stacklevel=5,
        )


def _check_classifier(joint: Joint, classifier: Joint, guidance: str) -> None:
    """Raises InvalidValue where a separate classifier cannot guide the joint's sampling."""

    def refuse(allowed: str):
        raise InvalidValue("classifier", NO_VALUE, allowed)

    takers = [name for name, record in GUIDANCE.items() if "classifier" in record.takes]
    if guidance not in takers:
        refuse(f"goes with guidance {' or '.join(takers)}, not {guidance!r}")
    if not classifier.has_classifier:
        refuse("is a model that was trained without a classifier")
    compared: dict[str, Callable[[Joint], Any]] = {
        "images of the shape": lambda one: one.image_shape,
        "num_classes": lambda one: one.model.num_classes,
        "multi_label": lambda one: one.model.multi_label,
        "the schedule": lambda one: (one.diffusion.schedule, one.diffusion.steps),
    }
    for what, value in compared.items():
        if value(classifier) != value(joint):
            refuse(f"has {what} {value(classifier)}; this model has {value(joint)}")
