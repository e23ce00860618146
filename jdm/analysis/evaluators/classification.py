"""Classification: how well the model's classifier predicts the labels of clean images."""

from collections.abc import Iterator

import numpy as np

from jdm.analysis.calibration import accuracy, brier_score, cross_entropy, labelled_rows
from jdm.analysis.evaluators.base import EvaluationOptions, Table, Value
from jdm.analysis.logits import check_labelled, image_logits
from jdm.data.splits import Split
from jdm.joint import Joint


def classification(
    joint: Joint, split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, Value]]:
    """Measures of the predictions for clean images at t = 0.

    Yields "accuracy", "cross_entropy" in nats and "brier", see jdm.analysis.calibration: means over
    the labels that are not -1, those of images [N] or of attributes [N, K]. Then the tables
    "classes" and "confusion", or for a multi-label model "mean_average_precision" and the table
    "attributes". In tables, a ratio is 0 where its denominator is; the counts are beside it.

    Raises InvalidValue for a split without labels.
    """
    check_labelled(split)
    return _values(joint, split, options)


def _values(joint: Joint, split: Split, options: EvaluationOptions) -> Iterator[tuple[str, Value]]:
    logits = image_logits(joint, split.images, options.batch_size, shared=options.shared)
    rows = labelled_rows(logits, split.labels)
    yield "accuracy", accuracy(*rows)
    yield "cross_entropy", cross_entropy(*rows)
    yield "brier", brier_score(*rows)
    names = joint.class_names or tuple(map(str, range(joint.model.num_classes)))
    by_name = _attributes if joint.model.multi_label else _classes
    yield from by_name(logits, split.labels, names)


def _classes(logits, labels, names) -> Iterator[tuple[str, Value]]:
    """Precision, recall, F1 and number of images of each class, and the confusion matrix: numbers
    of images by class (rows) and predicted class (columns)."""
    rows, labels = labelled_rows(logits, labels)
    predicted = rows.argmax(axis=1)
    pairs = np.bincount(labels * len(names) + predicted, minlength=len(names) ** 2)
    counts = pairs.reshape(len(names), len(names)).astype(float)
    right, of_class, of_predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    ratios = (right, of_predicted), (right, of_class), (2 * right, of_class + of_predicted)
    columns = [number / np.maximum(of, 1) for number, of in ratios]
    values = np.stack([*columns, of_class], axis=1).tolist()
    yield "classes", Table(names, ("precision", "recall", "F1", "images"), values)
    yield "confusion", Table(names, names, counts.tolist())


def _attributes(logits, labels, names) -> Iterator[tuple[str, Value]]:
    """The mean average precision, over the attributes that some image has. "attributes": accuracy
    and average precision of each, the number of known entries and of those that are 1."""
    from sklearn.metrics import average_precision_score

    values = []
    for scores, entries in zip(logits.T, labels.T, strict=True):
        known = entries >= 0
        scores, present = scores[known], entries[known] == 1
        right = np.sum((scores > 0) == present) / max(len(present), 1)
        precision = average_precision_score(present, scores) if present.any() else 0.0
        values.append([float(right), float(precision), float(len(present)), float(present.sum())])
    occurring = [precision for _, precision, _, positive in values if positive]
    yield "mean_average_precision", float(np.sum(occurring) / max(len(occurring), 1))
    columns = ("accuracy", "average precision", "known", "present")
    yield "attributes", Table(names, columns, values)


EVALUATOR = classification
