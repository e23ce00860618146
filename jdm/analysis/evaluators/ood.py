"""Out-of-distribution detection: telling the images of another data set from those of the split.

Every score is higher for images that are more likely to be out of distribution:

    max_probability    -max_k log p(k | x)                            Hendrycks & Gimpel 2017
    energy             -log sum_k exp(logit_k)                        Liu et al. 2020, eq. 4
    bound              the variational bound, in bits per dimension   see likelihood
    features           the distance to training images               see jdm.analysis.novelty

For a multi-label model, max_probability is the sum over attributes of -log max(p, 1 - p), and
energy is -sum_k log(1 + exp(logit_k)) (Wang et al. 2021).
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from jdm.analysis.evaluators.base import EvaluationOptions
from jdm.analysis.evaluators.likelihood import image_bounds
from jdm.analysis.logits import image_logits
from jdm.analysis.novelty import Novelty
from jdm.data.splits import Split
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint

Scores = Float[np.ndarray, " _"]


def max_probability(logits: Float[np.ndarray, "n k"], multi_label: bool) -> Scores:
    """-log of the largest class probability; smallest for the most confident prediction."""
    if multi_label:  # max(p, 1 - p) is the sigmoid of |logit|
        return np.logaddexp(0, -np.abs(logits)).sum(axis=1)
    return np.logaddexp.reduce(logits, axis=1) - logits.max(axis=1)


def energy(logits: Float[np.ndarray, "n k"], multi_label: bool) -> Scores:
    """The free energy of the logits."""
    if multi_label:
        return -np.logaddexp(0, logits).sum(axis=1)
    return -np.logaddexp.reduce(logits, axis=1)


def ood(joint: Joint, split: Split, options: EvaluationOptions) -> Iterator[tuple[str, float]]:
    """The area under the ROC curve of each score, for images of options.other against the split.

    Yields "auroc/max_probability", "auroc/energy", "auroc/bound" and "auroc/features", in [0, 1]:
    the probability that an image of the other data set has the higher score; 0.5 is chance. A model
    without a classifier has no logits, and one that does not generate has no bound: their scores
    are left out. The bound is estimated at options.bound_steps noise levels.

    Raises InvalidValue where options.other is None or has images that the model does not take, for
    a split or another data set without images, and where options.load is None.
    """
    other = _other(joint, options)
    if options.load is None:
        raise InvalidValue("metrics", "ood", "needs the split 'train', to compare images with")
    if not len(split.images):
        raise InvalidValue("split", split.name, "has no image")
    return _values(joint, split, other, options.load("train"), options)


def _values(
    joint: Joint, split: Split, other: Split, train: Split, options: EvaluationOptions
) -> Iterator[tuple[str, float]]:
    size, shared = options.batch_size, options.shared
    settings: dict[str, Any] = dict(seed=options.seed, batch_size=size, shared=shared)

    def auroc(score_of: Callable[[np.ndarray], Scores]) -> float:
        return separation(score_of(split.images), score_of(other.images))

    if joint.has_classifier:
        logits = [
            image_logits(joint, images, size, shared=shared).astype(np.float64)
            for images in (split.images, other.images)
        ]
        for score in (max_probability, energy):
            scores = (score(one, joint.model.multi_label) for one in logits)
            yield f"auroc/{score.__name__}", separation(*scores)
    if joint.has_diffusion:
        yield (
            "auroc/bound",
            auroc(lambda x: image_bounds(joint, x, options.bound_steps, **settings).per_image),
        )
    novelty = Novelty.fit(joint, train.images, **settings)
    yield "auroc/features", auroc(novelty.distances)


def separation(within: Scores, outside: Scores) -> float:
    """The area under the ROC curve of telling the two by their scores."""
    from sklearn.metrics import roc_auc_score

    labels = np.repeat([0, 1], [len(within), len(outside)])
    return float(roc_auc_score(labels, np.concatenate([within, outside])))


def _other(joint: Joint, options: EvaluationOptions) -> Split:
    """options.other, checked."""
    if options.other is None:
        needs = "needs a second data set, whose images it tells from those of the split"
        raise InvalidValue("metrics", "ood", needs)
    if not len(options.other.images):
        raise InvalidValue("other", NO_VALUE, "has no image")
    shape, takes = options.other.images.shape, joint.image_shape
    if shape[1:] != takes:
        sizes = ["×".join(map(str, one)) for one in (shape[1:], takes)]
        found = f"has {shape[0]:,} images of {sizes[0]}; this model takes {sizes[1]}"
        raise InvalidValue("other", NO_VALUE, found)
    return options.other


EVALUATOR = ood
