"""Probes: what the representations of a model know about the classes, by block and noise level.

The features of an image are the spatial means of a block's output, see `jdm.analysis.features`. A
probe is a classifier of these features, fitted on training images while the network stays as it is.
Everything that is chosen is chosen on the validation images: the setting of a probe, the block and
the noise level. The test images are read once, by what was chosen.

    Xiang et al. 2023, arXiv:2303.09769: linear probes of a diffusion model, by block and t
    Li et al. 2025, arXiv:2502.05743: the curve over t of a model that generalises or memorises
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from jdm import names
from jdm.analysis.evaluators.base import EvaluationOptions
from jdm.analysis.evaluators.classification import classification
from jdm.analysis.features import BlockFeatures, features, widths
from jdm.analysis.probe_options import ProbeOptions, default_levels
from jdm.data.labels import draw_rows
from jdm.data.splits import Split
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint
from jdm.names import check_name
from jdm.numerics import fixed_flags
from jdm.tracking import Progress

# How many standard errors apart two accuracies must be to count as different. Above the usual two,
# because the highest accuracy is picked from many.
ERRORS = 3.0
LEAST = 20  # training images, for 20 nearest neighbours
ITERATIONS = 1000  # of a logistic regression, at most


class Kind(NamedTuple):
    """A kind of probe. words: what it is. setting: the name of the number that is chosen on the
    validation images. candidates: its values, the smoothest probe first. make: value -> a
    classifier of scikit-learn."""

    words: str
    setting: str
    candidates: tuple[int | float, ...]
    make: Callable[[Any], Any]


PROBES: dict[str, Kind] = names.PROBES.records(
    linear=Kind(
        "logistic regression",
        "C",
        (0.001, 0.01, 0.1, 1.0, 10.0),
        lambda c: LogisticRegression(C=c, max_iter=ITERATIONS),
    ),
    knn=Kind("k nearest neighbours", "k", (20, 5, 1), KNeighborsClassifier),
)


class Shape(NamedTuple):
    """What a curve of accuracy over t looks like. name: "hump", "falling", "rising" or "undecided".
    sentence: this in words, with the numbers."""

    name: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """The probes of one kind. accuracy: of the validation images, [levels, blocks]. settings: the C
    or k of each. level, block, setting: the chosen ones. validation, test: their accuracy. stopped:
    how many probes ended at ITERATIONS, before they converged."""

    accuracy: Float[np.ndarray, "levels blocks"]
    settings: Num[np.ndarray, "levels blocks"]
    level: int
    block: str
    setting: int | float
    validation: float
    test: float
    stopped: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """What `probe` found. steps: T. images: the number of labelled images of each split. grids: by
    kind of probe. pixels: the test accuracy of the same probes of the clean images' pixels.
    classifier: the test accuracy of the model's own classifier, None where it has none. shape: that
    of the linear probe of the chosen block."""

    steps: int
    levels: tuple[int, ...]
    blocks: tuple[str, ...]
    images: Mapping[str, int]
    grids: Mapping[str, Grid]
    pixels: Mapping[str, float]
    classifier: float | None
    shape: Shape


def check(joint: Joint, options: ProbeOptions) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(levels, blocks) that the options mean for this model, in ascending order of t and in the
    order of computation.

    Raises InvalidValue for a level outside [0, T), an unknown block and a multi-label model.
    """
    if joint.model.multi_label:
        said = "is a multi-label model; a probe needs images of one class each"
        raise InvalidValue("joint", NO_VALUE, said)
    known, steps = tuple(widths(joint.model)), joint.diffusion.steps
    levels = default_levels(steps) if options.levels is None else tuple(sorted(options.levels))
    if levels[-1] >= steps:
        said = f"must lie in [0, {steps}), the noise levels of this model"
        raise InvalidValue("levels", options.levels, said)
    for name in options.blocks or ():
        check_name("blocks", name, known)
    return levels, tuple(name for name in known if name in (options.blocks or known))


@fixed_flags()
def probe(
    joint: Joint,
    splits: Mapping[str, Split],
    options: ProbeOptions,
    *,
    batch_size: int = 256,
) -> Probe:
    """Probes of every block at every noise level.

    splits: "train", "validation" and "test"; images without a label are left out. batch_size:
    images that the network evaluates at once; it does not change the values. The weights are the
    EMA. The features of all blocks at a level come from one pass of the network. Of equal
    validation accuracies the first counts: of the lowest level, then of the first block, then of
    the smoothest probe.

    Raises InvalidValue as `check` does, for a split that is missing or without labelled images, and
    where the training images are of one class.
    """
    levels, blocks = check(joint, options)
    data = labelled(splits, options)
    labels = {split: one.labels for split, one in data.items()}
    # Images are numbered through all splits, so that each has its own noise.
    counts = {split: len(one.labels) for split, one in data.items()}
    ends = np.cumsum(list(counts.values()))
    seeds = {
        split: options.seed + int(end) - counts[split]
        for split, end in zip(data, ends, strict=True)
    }

    def features_at(t: int, split: str) -> BlockFeatures:
        given = dict(seed=seeds[split], batch_size=batch_size)
        return features(joint, data[split].images, t, blocks, **given)

    fits: dict[tuple[str, int, str], _Fit] = {}
    best: dict[str, tuple[_Fit, int, str]] = {}
    with Progress(len(levels) * len(blocks), "probing", "blocks") as progress:
        for t in levels:
            at_t = {split: features_at(t, split) for split in ("train", "validation")}
            for block in blocks:
                x = {split: found.of(block) for split, found in at_t.items()}
                for kind in PROBES:
                    one = _fit(PROBES[kind], x, labels)
                    if kind not in best or one.accuracy > best[kind][0].accuracy:
                        best[kind] = one, t, block
                    # Without the classifier: nearest neighbours hold all training features.
                    fits[kind, t, block] = one._replace(classifier=None)
                progress.advance()

    grids = {}
    for kind, (chosen, t, block) in best.items():
        test = chosen.classifier.score(features_at(t, "test").of(block), labels["test"])
        cells = [[fits[kind, level, name] for name in blocks] for level in levels]
        grids[kind] = Grid(
            np.array([[one.accuracy for one in row] for row in cells]),
            np.array([[one.setting for one in row] for row in cells]),
            *(t, block, chosen.setting, chosen.accuracy, float(test)),
            sum(one.stopped for row in cells for one in row),
        )
    curve = np.stack([fits["linear", t, grids["linear"].block].right for t in levels])
    pixels = {split: one.images.reshape(len(one.images), -1) for split, one in data.items()}
    on_pixels = {kind: _fit(one, pixels, labels).classifier for kind, one in PROBES.items()}
    return Probe(
        joint.diffusion.steps,
        levels,
        blocks,
        counts,
        grids,
        {k: float(one.score(pixels["test"], labels["test"])) for k, one in on_pixels.items()},
        _own_accuracy(joint, data["test"], batch_size),
        shape_over_t(levels, curve, joint.has_classifier),
    )


def labelled(splits: Mapping[str, Split], options: ProbeOptions) -> dict[str, Split]:
    """The labelled images of each split; of "train" at most options.images, of each class in
    proportion. Raises InvalidValue as `probe` does."""
    found = {}
    for name in names.SPLITS:
        if name not in splits:
            said = f"has no {name}; a probe needs {', '.join(names.SPLITS)}"
            raise InvalidValue("splits", tuple(splits), said)
        images, labels = splits[name]
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise InvalidValue("split", name, "has no labelled image")
        if name == "train" and len(rows) > options.images:
            rows = np.sort(draw_rows(labels, options.images, options.seed, labels >= 0))
        found[name] = Split(images[rows], labels[rows], name)
    count, classes = len(found["train"].labels), len(np.unique(found["train"].labels))
    if count < LEAST or classes < 2:
        left = f"{count} labelled training images and {classes} class{'es' * (classes != 1)}"
        said = f"leaves {left}; a probe needs {LEAST} images and 2 classes"
        raise InvalidValue("images", options.images, said)
    return found


class _Fit(NamedTuple):
    """A fitted probe. setting: its C or k. right: which validation images it gets right. stopped:
    whether it ended at ITERATIONS, before it converged."""

    setting: int | float
    right: Bool[np.ndarray, " n"]
    classifier: Any
    stopped: bool

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def _fit(kind: Kind, x: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> _Fit:
    """The probe of features {split: [N, D]} with the setting that is best on "validation".

    Features are scaled to mean 0 and variance 1 over the training images.
    """
    scaler = StandardScaler().fit(x["train"])
    train, validation = scaler.transform(x["train"]), scaler.transform(x["validation"])
    fits = []
    # One thread: the products are small, and on a busy machine threads wait for each other.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # they are counted
        for setting in kind.candidates:
            classifier = kind.make(setting).fit(train, labels["train"])
            right = classifier.predict(validation) == labels["validation"]
            stopped = np.max(getattr(classifier, "n_iter_", 0)) >= ITERATIONS
            fits.append(_Fit(setting, right, make_pipeline(scaler, classifier), bool(stopped)))
    return max(fits, key=lambda one: one.accuracy)  # the first of equal ones


def _own_accuracy(joint: Joint, test: Split, batch_size: int) -> float | None:
    """The test accuracy of the model's own classifier; None where it has none."""
    if not joint.has_classifier:
        return None
    found = dict(classification(joint, test, EvaluationOptions(batch_size)))
    return float(found["accuracy"])  # type: ignore[arg-type]


def shape_over_t(
    levels: Sequence[int], right: Bool[np.ndarray, "levels n"], saw_labels: bool = False
) -> Shape:
    """What the accuracy of one probe over t says, with a rule that would rather stay undecided.

    right: which of n images the probe gets right at each level, in ascending order. saw_labels:
    whether the network was trained on labels too. A level is *below* the best one where its
    accuracy is lower by more than ERRORS standard errors of the difference on the same images
    (McNemar 1947: (b - c) / sqrt(b + c), for b images that only the best level gets right and c
    that only the other does). The curve is

        hump       t = 0 and the last level are below, and the levels that are not are neighbours
        falling    every level but t = 0 is below
        rising     t = 0 is below and the last level is not
        undecided  otherwise, and without t = 0 or with fewer than three levels

    Li et al. 2025 (arXiv:2502.05743) see a hump in diffusion models that generalise, and a curve
    that falls from t = 0 once they memorise their training images.
    """
    accuracy = right.mean(axis=1)
    best = int(accuracy.argmax())
    wins, losses = (right[best] & ~right).sum(axis=1), (~right[best] & right).sum(axis=1)
    below = wins - losses > ERRORS * np.sqrt(wins + losses)
    top = np.flatnonzero(~below)
    at = [f"{value:.3f} at t = {t}" for t, value in zip(levels, accuracy, strict=True)]
    if levels[0] != 0 or len(levels) < 3:
        return Shape("undecided", "The shape over t needs t = 0 and at least two more levels.")
    if below[0] and below[-1] and np.ptp(top) == len(top) - 1:
        name = "hump"
        said = f"has one hump ({at[0]}, {at[best]}, {at[-1]}), as in models that generalise"
    elif below[1:].all():
        name = "falling"
        said = f"falls from t = 0 on ({at[0]}, {at[1]}), as in models that memorise"
    elif below[0] and not below[-1]:
        name, said = "rising", f"still rises at the last level ({at[0]}, {at[-1]})"
    else:
        same = ", ".join(str(levels[int(i)]) for i in top)
        name, said = "undecided", f"shows no clear shape: t = {same} cannot be told apart"
    if name in ("hump", "falling") and saw_labels:
        said += "; this network was trained on labels, though, and those were not"
    return Shape(name, f"The accuracy over t {said}.")
