"""Classification: accuracy and cross-entropy of the model's classifier on clean images."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jdm.analysis.evaluators.base import EvaluationOptions
from jdm.data.pipeline import eval_batches
from jdm.data.splits import Split
from jdm.diffusion.process import pixels_to_float
from jdm.errors import InvalidValue
from jdm.joint import Joint, logits_of
from jdm.training.terms.classifier import ENTROPIES


def classification(
    joint: Joint, split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, float]]:
    """Yields ("accuracy", in [0, 1]) and ("cross_entropy", in nats) of clean images at t = 0.

    Both are means over the labels that are not -1: those of images [N], or of attributes [N, K].
    Raises InvalidValue for a split without labels.
    """
    cross_entropy_fn, sums = ENTROPIES[joint.model.multi_label], np.zeros(3)
    for batch in eval_batches(split.images, split.labels, options.batch_size):
        x = pixels_to_float(jnp.asarray(batch["image"]))
        logits = logits_of(joint.model, joint.weights, x, jnp.zeros(len(x), jnp.int32))
        # Padding has the label -1, which is not counted.
        rows = np.array(cross_entropy_fn(logits, jnp.asarray(batch["label"])), np.float64)
        sums += rows.sum(axis=1)
    cross_entropy, correct, count = sums
    if count == 0:
        raise InvalidValue("split", split.name, "has no labelled image")
    yield "accuracy", correct / count
    yield "cross_entropy", cross_entropy / count


EVALUATOR = classification
