"""Class probabilities against labels: their errors, their calibration, and a temperature.

Computed with numpy, in float64. No JAX, no model. Predictions are logits [M, K] and
labels int [M] in [0, K), without unlabelled rows. An attribute of a multi-label model is a
prediction with the two classes 0 (absent) and 1 (present): see `labelled_rows`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Logits = Float[np.ndarray, "m classes"]
Labels = Int[np.ndarray, " m"]
BINS = 15  # Guo et al. 2017, section 4.1
TEMPERATURES = 0.01, 100.0  # the range that is searched


def labelled_rows(
    logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n ..."]
) -> tuple[Logits, Labels]:
    """(logits float64 [M, K], labels [M]) of the rows whose label is not -1.

    labels: [N], or [N, K] of a multi-label model, whose entries become rows of their own with the
    logits (0, logit), since softmax(0, l) = (1 - sigmoid(l), sigmoid(l)).
    """
    known, logits = labels >= 0, logits.astype(np.float64)
    if labels.ndim > 1:
        logits = np.stack([np.zeros_like(logits), logits], axis=-1)
    return logits[known], labels[known].astype(np.int64)


def log_softmax(logits: Logits) -> Logits:
    """The logarithms of the class probabilities."""
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def accuracy(logits: Logits, labels: Labels) -> float:
    """The share of rows whose largest logit is that of the label, in [0, 1]."""
    return float(np.mean(logits.argmax(axis=1) == labels))


def cross_entropy(logits: Logits, labels: Labels) -> float:
    """The mean of -log p(label), in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def brier_score(logits: Logits, labels: Labels) -> float:
    """The mean over rows of sum_k (p_k - [k = label])², in [0, 2]. Brier 1950.

    With two classes it is twice the score that counts one of them alone.
    """
    errors = np.exp(log_softmax(logits))
    errors[np.arange(len(labels)), labels] -= 1
    return float((errors**2).sum(axis=1).mean())


class Reliability(NamedTuple):
    """Predictions by confidence, the largest class probability: one entry for each bin that is not
    empty. confidence, accuracy: means over the bin. share: of all predictions."""

    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    share: Float[np.ndarray, " bins"]

    @property
    def expected_calibration_error(self) -> float:
        """sum over bins of share · |accuracy - confidence|. Guo et al. 2017, eq. 3."""
        return float((self.share * np.abs(self.accuracy - self.confidence)).sum())


def reliability(logits: Logits, labels: Labels, bins: int = BINS) -> Reliability:
    """Predictions in the bins ((m - 1) / bins, m / bins], m = 1 to bins. Guo et al. 2017, eq. 2."""
    confidence = np.exp(log_softmax(logits).max(axis=1))
    inner_edges = np.arange(1, bins) / bins
    found = np.searchsorted(inner_edges, confidence, side="left")  # an edge is in the lower bin
    counts = np.bincount(found, minlength=bins)
    sums = [np.bincount(found, of, bins) for of in (confidence, logits.argmax(axis=1) == labels)]
    filled = counts > 0
    confidences, accuracies = (total[filled] / counts[filled] for total in sums)
    return Reliability(confidences, accuracies, counts[filled] / len(labels))


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """The T for which logits / T have the least cross-entropy. Guo et al. 2017, section 4.2.

    Above 1, the model is overconfident. T lies in [0.01, 100]. Where every row is right, the
    cross-entropy falls to 0 with T, and T is one of those that are small enough.
    """
    from scipy.optimize import minimize_scalar  # not above: it takes a second to import

    # Convex in 1 / T, so there is one minimum over log T.
    found = minimize_scalar(
        lambda log_t: cross_entropy(logits / np.exp(log_t), labels),
        bounds=np.log(TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))
