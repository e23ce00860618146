"""Generation: how well samples show their classes, and how near they are to real images.

One set of samples serves all figures. Every figure of samples has one of real images beside it: the
reference classifiers' accuracy on real images, and the distances of other real images from the
split. A distance depends on the number of images and on the features that it is measured in, so
both are parts of its name: "frechet_1000/reference". From 10,000 images up the number is left out.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jdm.analysis import metrics
from jdm.analysis.evaluators.base import EvaluationOptions, Record, Table, Value
from jdm.analysis.extractors import EXTRACTORS, Make, real_features
from jdm.analysis.reference import Reference, make_reference
from jdm.analysis.shares import in_shares
from jdm.data.splits import ReadOptions, Split, cache_root
from jdm.diffusion.guidance import GUIDANCE, chosen
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint, check_trained, digest
from jdm.names import check_name
from jdm.sampling.generate import generate
from jdm.sampling.request import check_request
from jdm.sampling.samples import Samples

MANY = 10_000  # images, from which on their number is not part of a name


def generation(
    joint: Joint, split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, Value]]:
    """Yields, for `options.samples` samples with the seeds options.seed, options.seed + 1, …:

    - "agreement/<name>": the share of samples that a reference classifier takes for the class that
      they were guided to, beside "agreement/<name>_real", its accuracy on real images; and by class
      ("agreement_by_class"). Labels are cycled over the classes. Not for a model without a
      classifier or with several attributes, nor without guidance.
    - "frechet", "kid", "precision", "recall", "prd_f8" and "prd_f1_8" of samples and the split, in
      options.features; with "_real", of other real images, equally many where there are as many.
    - "nearest_neighbour_ratio/mean" and "/least", see metrics.nearest_neighbour_ratio; and
      "diversity/mean" and "/least" within a class, see metrics.diversity_ratio.
    - "generation": what these depend on, a Record.

    The other real images are those of "train". Of the split "train" itself, they are those of
    "test", which are then also what reference classifiers are tested on.

    Raises InvalidValue, before anything is sampled, for a model that was not trained to generate,
    too few images, unknown features, and features that cannot be computed here.
    """
    check_trained(joint, "diffusion")
    make_extractor = EXTRACTORS[check_name("features", options.features, EXTRACTORS)]
    train, held_out = _other_splits(split, options)
    labelled = _is_guided(joint, options) and all((x.labels >= 0).any() for x in (train, held_out))
    _check_counts(joint, split, train, options.samples, labelled)
    cache = options.cache or cache_root(ReadOptions.of(joint.config.data, joint.config.model))
    size, shared = options.batch_size, options.shared
    fit = functools.partial(make_reference, joint, train, Path(cache), size, shared)
    reference = functools.cache(fit)  # fitted where it is needed
    make = make_extractor(joint, reference, size, shared)
    return _values(joint, split, options, train, held_out, labelled, reference, make, cache)


def _values(
    joint: Joint,
    split: Split,
    options: EvaluationOptions,
    train: Split,
    held_out: Split,
    labelled: bool,
    reference: Callable[[], Reference],
    make_extractor: Make,
    cache: str | Path,
) -> Iterator[tuple[str, Value]]:
    samples = _sample(joint, options)
    if labelled:
        yield from _agreement(joint, reference(), samples, held_out)

    extractor = make_extractor()

    def of_real(images: np.ndarray) -> Float[np.ndarray, "n d"]:
        return real_features(extractor, images, Path(cache), options.shared)

    other = (held_out if split.name == "train" else train).images
    other = other[_draw(len(other), options.samples, options.seed)]
    real = of_real(split.images)
    compared = {"": extractor.extract(samples.images), "_real": of_real(other)}
    for ending, found in compared.items():
        number = min(len(real), len(found))
        ending += f"_{number}" if number < MANY else ""
        for name, value in _distances(real, found, options.seed):
            yield f"{name}{ending}/{extractor.name}", value

    rows = _draw(len(held_out.images), options.samples, options.seed)
    images, labels = held_out.images[rows], held_out.labels[rows]
    ratio = metrics.nearest_neighbour_ratio(train.images, images, samples.images)
    yield from ((f"nearest_neighbour_ratio/{name}", value) for name, value in ratio.items())
    if samples.labels is not None and labelled:
        ratio = metrics.diversity_ratio(samples.images, samples.labels, images, labels)
        yield from ((f"diversity/{name}", value) for name, value in ratio.items())
    yield (
        "generation",
        Record(
            {
                "features": extractor.identity,
                "reference": reference().digest if labelled else None,
                "samples": len(samples),
                "seeds": [int(samples.seeds[0]), int(samples.seeds[-1])],
                "split": split.name,
                "split_images": len(split.images),
                "split_contents": digest([split.images]),
                "other_real_images": len(other),
                "method": samples.settings,
            }
        ),
    )


def _other_splits(split: Split, options: EvaluationOptions) -> tuple[Split, Split]:
    """(the training split, a split of images that nothing was fitted on)."""
    if options.load is None:
        needs = "is given without the training split, which samples are compared with"
        raise InvalidValue("split", split.name, needs)
    if split.name == "train":
        return split, options.load("test")
    return options.load("train"), split


def _is_guided(joint: Joint, options: EvaluationOptions) -> bool:
    """Whether samples have a class that they are guided to."""
    guidance = GUIDANCE[chosen(options.method, joint.has_classifier).guidance]
    return joint.has_classifier and not joint.model.multi_label and "labels" in guidance.takes


def _check_counts(joint: Joint, split: Split, train: Split, samples: int, labelled: bool) -> None:
    """Raises InvalidValue where there are too few images for the figures."""
    least = max(metrics.CLUSTERS, 2 * joint.model.num_classes if labelled else 0)
    if samples < least:
        allowed = f"are too few: {least} or more are needed"
        why = f", two of each of {joint.model.num_classes} classes" * (least > metrics.CLUSTERS)
        raise InvalidValue("samples", samples, allowed + why)
    for one in (split, train):
        if (count := len(one.images)) < metrics.CLUSTERS:
            allowed = f"has {count} images; distances need {metrics.CLUSTERS} or more"
            raise InvalidValue("split", one.name or NO_VALUE, allowed)


def _sample(joint: Joint, options: EvaluationOptions) -> Samples:
    number = np.arange(options.samples)
    seeds = (options.seed + number) % 2**32
    labels = number % joint.model.num_classes if _is_guided(joint, options) else None
    request = check_request(joint, labels=labels, seeds=seeds, method=options.method)

    def images(rows: slice) -> np.ndarray:
        return generate(joint, request.part(rows), batch_size=None).images

    whole = in_shares(images, options.samples, options.shared)
    return Samples(whole, request.labels, request.seeds, request.settings(joint))


def _draw(count: int, most: int, seed: int) -> Int[np.ndarray, " n"]:
    """Rows in ascending order, at random; at most `most` of them."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(count, min(count, most), replace=False))


def _agreement(
    joint: Joint, reference: Reference, samples: Samples, real: Split
) -> Iterator[tuple[str, Value]]:
    """The rates of the reference classifiers, over all images and by class."""
    known = real.labels >= 0
    sets = {
        "": (samples.images, samples.labels),
        "_real": (real.images[known], real.labels[known]),
    }
    columns, by_class = [], []
    for name, predict in reference.predictors.items():
        for ending, (images, labels) in sets.items():
            right = predict(images) == labels
            yield f"agreement/{name}{ending}", float(right.mean())
            columns.append(f"{name}{ending}")
            by_class.append([_mean(right[labels == k]) for k in range(joint.model.num_classes)])
    rows = joint.class_names or tuple(map(str, range(joint.model.num_classes)))
    yield (
        "agreement_by_class",
        Table(rows, columns, [list(row) for row in zip(*by_class, strict=True)]),
    )


def _mean(values: np.ndarray) -> float:
    """The mean, NaN of none: a split may lack a class."""
    return float(values.mean()) if len(values) else float("nan")


def _distances(
    real: Float[np.ndarray, "m d"], found: Float[np.ndarray, "n d"], seed: int
) -> Iterator[tuple[str, float]]:
    """The figures of features of images against those of real ones."""
    yield "frechet", metrics.frechet_distance(real, found)
    yield "kid", metrics.kernel_distance(real, found)
    improved = metrics.precision_recall(real, found)
    yield "precision", improved.precision
    yield "recall", improved.recall
    prd = metrics.prd_scores(real, found, seed=seed)
    yield "prd_f8", prd.f8
    yield "prd_f1_8", prd.f1_8


EVALUATOR = generation
