"""Noise: how far the model's classifier recognises noised images."""

from collections.abc import Iterator

import numpy as np

from jdm.analysis.calibration import accuracy
from jdm.analysis.evaluators.base import Curve, EvaluationOptions
from jdm.analysis.logits import check_labelled, labelled_logits
from jdm.data.splits import Split
from jdm.joint import Joint

LEVELS = 8  # noise levels, evenly spaced from 0 (clean images) to T - 1


def noise(joint: Joint, split: Split, options: EvaluationOptions) -> Iterator[tuple[str, Curve]]:
    """Yields the curve "accuracy_by_t": the accuracy at 8 noise levels t from 0 to T - 1.

    x_t has the same noise at every t, which depends on options.seed and the index of the image. At
    t = 0 images are clean, and the accuracy is that of `classification`.

    Raises InvalidValue for a split without labels.
    """
    check_labelled(split)
    return _values(joint, split, options)


def _values(joint: Joint, split: Split, options: EvaluationOptions) -> Iterator[tuple[str, Curve]]:
    levels = np.unique(np.linspace(0, joint.diffusion.steps - 1, LEVELS).round().astype(int))
    size, seed, shared = options.batch_size, options.seed, options.shared
    found = [accuracy(*labelled_logits(joint, split, size, int(t), seed, shared)) for t in levels]
    yield "accuracy_by_t", Curve("t", "accuracy", levels.tolist(), {"accuracy": found})


EVALUATOR = noise
