"""`jdm.explain`: what would have to change in an image for the model to see another class in it.

Counterfactual images after Deja et al. 2023, section 4: an image is noised part of the way and
denoised toward another class. The strengths, that is the parts of the way, are tried in rising
order, each with several noises, until the model sees the target with the required confidence, and
still sees it after the result was noised and denoised again without guidance. A change that only
fools the classifier is lost then.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.special import expit, softmax

from jdm.analysis.explain.explanations import ALREADY, KEPT, UNLIKE, Explanations, shown_in
from jdm.analysis.explain.program import Denoiser, noised_probabilities, times_from
from jdm.analysis.explain.search import noise_seeds, search
from jdm.analysis.explain_options import AGAIN, FITTED, OPTIONS, ExplainOptions
from jdm.analysis.features import features
from jdm.analysis.logits import image_logits
from jdm.analysis.novelty import Novelty
from jdm.analysis.reference import make_reference
from jdm.data.identity import checked_contents
from jdm.data.splits import ReadOptions, Split, cache_root, load_split
from jdm.diffusion.guidance import GUIDANCE
from jdm.diffusion.guidance import chosen as choose
from jdm.diffusion.method import OPTIONS as METHOD
from jdm.diffusion.method import Method, method_of
from jdm.diffusion.process import float_to_pixels
from jdm.diffusion.samplers import SAMPLERS
from jdm.errors import NO_VALUE, Failure, InvalidValue
from jdm.joint import Joint, as_joint, check_images, check_trained, name_of
from jdm.names import did_you_mean
from jdm.numerics import fixed_flags
from jdm.options import plain_number, takes
from jdm.sampling.labels import Numbers, whole_numbers
from jdm.sampling.request import check_request

# What is left open: ddim keeps what the noise of an image says about it, where a sampler that draws
# noise replaces it.
DEFAULTS: dict[str, Any] = dict(sampler="ddim", steps=20, guidance="pixel")
BATCH = 64  # images in one forward pass of a classifier
_kept: dict[tuple[str, str], Novelty] = {}  # of the last model, see _novelty_of
NOVEL = 99.0  # percentile of the training images, above which an image is unlike them

Reference = Callable[[UInt8[np.ndarray, "n h w c"]], np.ndarray]


@takes({**OPTIONS, **METHOD}, described_here=OPTIONS, defaults=DEFAULTS)
@fixed_flags()
def explain(
    joint: Joint | str | os.PathLike,
    images: Any,
    target: Any,
    *,
    seeds: Numbers = (0,),
    region: Any = None,
    reference: Joint | str | os.PathLike | Reference | None = None,
    training_images: Any = None,
    batch_size: int | None = None,
    **options: Any,
) -> Explanations:
    """Counterfactuals: the images, changed so that the model sees the target in them.

    images: uint8 [N, H, W, C], or floats in [-1, 1], see `jdm.classify`. target: a class by its
    number or name, or a list of one for each image; for a multi-label model attributes [N, K] or
    [K]: 1 (on), 0 (off) or -1 (any). seeds: of the noise, which differs from image to image; each
    gives one counterfactual of every image. region: bool [H, W], the pixels that may change; None
    is all. reference: an independent classifier, which is asked whether it agrees: a Joint, a path,
    a function from uint8 images [N, H, W, C] to probabilities [N, K] or classes [N], or "fitted",
    the reference classifier of `jdm eval`, which is fitted on the training images once.
    training_images: uint8 [M, H, W, C]; an image that is farther from them, in the model's
    features, than 99 % of them are from each other is not changed, since what the model says of it
    has no ground. None reads those that the model was trained on, and warns where they are not
    prepared. batch_size: the most images per device and call.

    OPTIONS

    The options of `jdm.sample` are taken too, such as guidance, scale and steps.

    Raises InvalidValue, naming the argument, before anything is changed; MemoryError where not even
    one image for each device fits.
    """
    path, joint = name_of(joint), as_joint(joint)
    for name in options.keys() - OPTIONS.keys() - METHOD.keys():
        raise TypeError(f"unexpected keyword argument {name!r}")
    given = {k: plain_number(v) for k, v in options.items() if k in OPTIONS}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    chosen = ExplainOptions(**given)
    method = method_of(None, DEFAULTS | {k: v for k, v in options.items() if k in METHOD})
    guides = [name for name, record in GUIDANCE.items() if "labels" in record.takes]
    if method.guidance not in guides:
        allowed = f"leads to no target; a counterfactual needs {', '.join(guides)}"
        raise InvalidValue("guidance", method.guidance, allowed)
    check_trained(joint, "diffusion")
    check_trained(joint, "classifier")
    before = _pixels(check_images(joint, images, least=1))
    labels = check_target(joint, target, len(before))
    seeds = whole_numbers("seeds", seeds)
    mask = _check_region(joint, region)
    again = chosen.again or AGAIN
    times_from(joint.diffusion, method, min(again, chosen.strengths[0]))  # raises for few levels
    noised = _noised_confidence(joint, chosen)

    rows = np.repeat(np.arange(len(before)), len(seeds))
    request = check_request(
        joint,
        len(rows),
        method=method,
        labels=labels[rows],
        seeds=np.tile(seeds, len(before)),
        batch_size=batch_size,
    )
    model_fn = functools.partial(_classify, joint)
    seen = model_fn(before)
    already = shown_in(seen, labels)
    if already.all():
        raise InvalidValue("target", plain_number(target), "is what the model sees already")
    novelty = _novelty(joint, before, training_images)
    reasons = np.where(already, ALREADY, "").astype(object)
    if novelty is not None:
        reasons[novelty > NOVEL] = UNLIKE
    # After all checks, since a network may have to be trained first.
    reference_fn = None if reference is None else _probabilities_of(reference, joint)

    method = request.recipe.method
    if chosen.start == "inversion" and not SAMPLERS[method.sampler].draws_noise(method):
        chosen = dataclasses.replace(chosen, draws=1)  # others would be the same image
    free = Method(sampler="ddim", steps=method.steps, guidance="none")
    most = len(rows) * chosen.draws
    unguided = Denoiser(joint, choose(free, False), most, batch_size=batch_size)
    masked = chosen.shares != (1.0,) or not mask.all()
    guided = dataclasses.replace(
        unguided, method=method, start=chosen.start, masked=masked, region=mask
    )

    targets, level = labels[rows], times_from(joint.diffusion, free, again)[0]

    def shows(changed: np.ndarray, of: np.ndarray) -> np.ndarray:
        return shown_in(model_fn(changed), targets[of])

    def convinces(changed: np.ndarray, of: np.ndarray, noise: np.ndarray) -> np.ndarray:
        found = shown_in(model_fn(changed), targets[of], chosen.confidence)
        if noised > 0:
            left = changed[found], noise[found]
            of_copies = noised_probabilities(joint, *left, level, BATCH)
            found[found] = shown_in(of_copies, targets[of][found], noised)
        return found

    images, asked = before[rows], (reasons == "")[rows]
    noise = noise_seeds(images, request.seeds)
    whole = images, noise, request.targets, asked, shows, convinces
    found = search(guided, unguided, chosen, request.scale, *whole)
    reasons = reasons[rows]
    reasons[asked & np.isnan(found.strength)] = KEPT
    settings = {
        **dataclasses.asdict(chosen) | {"noised": noised},
        **method.settings(),
        "scale": request.scale,
        "model": path,
        "weights": joint.digest,
        "reference": None if reference is None else _name(reference),
    }
    return Explanations(
        images=rows,
        seeds=request.seeds,
        before=images,
        found=found,
        targets=targets,
        probabilities_before=seen[rows],
        probabilities_after=model_fn(found.after),
        probabilities_control=model_fn(found.control),
        reference_before=None if reference_fn is None else reference_fn(images),
        reference_after=None if reference_fn is None else reference_fn(found.after),
        reasons=tuple(reasons),
        novelty=None if novelty is None else novelty[rows],
        feature_distance=_feature_distance(joint, images, found.after),
        settings=settings,
        class_names=joint.class_names,
    )


def check_target(joint: Joint, target: Any, n: int) -> np.ndarray:
    """The target of each image: classes int32 [N]; of a multi-label model attributes int8 [N, K].

    Raises InvalidValue for anything that is not a class of the model.
    """
    model, shown = joint.model, plain_number(target)
    if model.multi_label:
        rows = np.atleast_2d(np.asarray(target))
        if rows.shape not in ((1, model.num_classes), (n, model.num_classes)) or not (
            np.isin(rows, (-1, 0, 1)).all() and (rows >= 0).any(axis=1).all()
        ):
            allowed = f"must be attributes [{model.num_classes}] of 1 (on), 0 (off) or -1 (any)"
            raise InvalidValue("target", NO_VALUE, f"{allowed}, for all images or each of {n}")
        return np.broadcast_to(rows, (n, model.num_classes)).astype(np.int8)
    entries = [target] if isinstance(target, str) or np.ndim(target) == 0 else list(target)
    if len(entries) not in (1, n):
        raise InvalidValue("target", shown, f"has {len(entries)} entries for {n} images")
    numbers = [_class(joint, plain_number(one)) for one in entries]
    return np.broadcast_to(np.array(numbers, np.int32), (n,)).copy()


def _class(joint: Joint, one: Any) -> int:
    """The number of a class that is given by its number or name."""
    names, count = list(joint.class_names), joint.model.num_classes
    if isinstance(one, str) and one in names:
        return names.index(one)
    number = int(one) if isinstance(one, str) and one.isdecimal() else one
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
        return number
    known = f"the classes are 0 to {count - 1}"
    if not all(name.isdecimal() for name in names):
        known += f": {', '.join(names)}"
    raise InvalidValue("target", one, f"is no class; {known}", did_you_mean(one, names))


def _check_region(joint: Joint, region: Any) -> Bool[np.ndarray, "1 h w 1"]:
    height, width, _ = joint.image_shape
    found = np.ones((height, width), bool) if region is None else np.asarray(region)
    if found.shape != (height, width) or found.dtype != bool:
        got = f"is {found.dtype}{found.shape}"
        raise InvalidValue(
            "region", NO_VALUE, f"{got}; bool of the shape ({height}, {width}) is needed"
        )
    if not found.any():
        raise InvalidValue("region", NO_VALUE, "has no pixel that may change")
    return found[None, :, :, None]


def _noised_confidence(joint: Joint, chosen: ExplainOptions) -> float:
    """The probability that noised copies must reach. A classifier that was trained on clean images
    alone says nothing about them: it is not asked. Raises InvalidValue where it should be."""
    if joint.config.loss.classify != "clean":
        return chosen.noised_confidence
    if chosen.noised:
        allowed = "needs a classifier that was trained on noised images too"
        raise InvalidValue("noised", chosen.noised, f"{allowed}, not with loss.classify='clean'")
    return 0.0


def _pixels(images: np.ndarray) -> UInt8[np.ndarray, "n h w c"]:
    return images if images.dtype == np.uint8 else np.asarray(float_to_pixels(jnp.asarray(images)))


def _classify(joint: Joint, images: np.ndarray) -> Float[np.ndarray, "n k"]:
    """Probabilities, in batches of one shape for any number of images."""
    logits = image_logits(joint, images, BATCH)
    return expit(logits) if joint.model.multi_label else softmax(logits, axis=1)


def _name(reference: Any) -> str:
    return "a function" if callable(reference) else name_of(reference)


def _probabilities_of(reference: Any, joint: Joint) -> Reference:
    """The reference classifier as a function from uint8 images to probabilities [N, K]."""
    if reference == FITTED:
        options = ReadOptions.of(joint.config.data, joint.config.model)
        reference = make_reference(joint, _training(joint), cache_root(options), BATCH).classify
    if not callable(reference):
        other = as_joint(reference, "reference")
        check_reference(joint, other)
        return functools.partial(_classify, other)
    count = joint.model.num_classes

    def probabilities(images: np.ndarray) -> np.ndarray:
        found = np.asarray(reference(images))
        return np.eye(count, dtype=np.float32)[found] if found.ndim == 1 else found

    return probabilities


def check_reference(joint: Joint, other: Joint) -> None:
    """Raises InvalidValue where another model has other images or classes, or no classifier."""
    if not other.has_classifier:
        raise InvalidValue(
            "reference", NO_VALUE, "is a model that was trained without a classifier"
        )
    for what, mine, its in (
        ("images of the shape", joint.image_shape, other.image_shape),
        ("num_classes", joint.model.num_classes, other.model.num_classes),
    ):
        if mine != its:
            raise InvalidValue("reference", NO_VALUE, f"has {what} {its}; this model has {mine}")


def _training(joint: Joint) -> Split:
    """The images that the model was trained on. Raises InvalidValue where they are others now."""
    name, options = joint.config.data.name, ReadOptions.of(joint.config.data, joint.config.model)
    checked_contents(joint.dataset, name, options, ["train"], "")
    return load_split(name, "train", options)


def _novelty(joint: Joint, images: np.ndarray, training: Any) -> Float[np.ndarray, " n"] | None:
    """The percentile of each image's distance to the training images, among their own."""
    try:
        novelty = _novelty_of(joint, training)
    except (Failure, InvalidValue) as error:
        if training is not None:
            raise
        text = f"images are not compared with the training images: {error}"
        warnings.warn(text, stacklevel=4)
        return None
    return novelty.percentiles(novelty.distances(images))


def _novelty_of(joint: Joint, training: Any) -> Novelty:
    """That of given training images, or of those that the model was trained on, which is kept for
    the next call with the same weights."""
    if training is not None:
        return Novelty.fit(joint, _pixels(check_images(joint, training)))
    key = (joint.digest, joint.config.data.to_json())
    if key not in _kept:
        novelty = Novelty.fit(joint, _pixels(check_images(joint, _training(joint).images)))
        _kept.clear()
        _kept[key] = novelty
    return _kept[key]


def _feature_distance(joint: Joint, a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " n"]:
    """Euclidean distance of the spatial means of the model's bottleneck, of the clean images."""
    found = [features(joint, images, 0, "mid", batch_size=BATCH).values for images in (a, b)]
    return np.linalg.norm(found[0] - found[1], axis=1)
