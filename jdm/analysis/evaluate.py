"""Evaluation of a trained model on a data split; yields (name, value).

Owns the protocol: which images, which noise level, what is summed and divided when. The numbers
themselves are simple enough to stand here.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from jdm.data.pipeline import eval_batches
from jdm.diffusion.process import pixels_to_float
from jdm.joint import Joint
from jdm.training.loss import ENTROPIES


def classification(
    joint: Joint,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n ..."],
    batch_size: int,
) -> Iterator[tuple[str, float]]:
    """("accuracy", fraction) and ("cross_entropy", nats) of clean images at t = 0.

    Sums over the labelled images (label -1 is not) and divides once, so that the batch size makes
    no difference. Of a multi-label model both are over the entries of [N, K] labels that are not
    -1. Raises ValueError where no image is labelled.
    """
    entropy_of, sums = ENTROPIES[joint.model.multi_label], np.zeros(3)
    for batch in eval_batches(images, labels, batch_size):
        logits = joint.logits(pixels_to_float(jnp.asarray(batch["image"])))
        # Padded rows are labelled -1 as they come.
        rows = np.array(entropy_of(logits, jnp.asarray(batch["label"])), np.float64)
        sums += rows.sum(axis=1)
    entropy, correct, count = sums
    if count == 0:
        raise ValueError("no image of the split is labelled")
    yield "accuracy", correct / count
    yield "cross_entropy", entropy / count
