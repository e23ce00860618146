"""jdm.analysis.calibration: the numbers, against known answers and scikit-learn."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import brier_score_loss, log_loss

from jdm.analysis.calibration import (
    accuracy,
    brier_score,
    cross_entropy,
    fit_temperature,
    labelled_rows,
    reliability,
)


@pytest.fixture(scope="module")
def predictions():
    """Logits of 4,000 rows, and labels drawn from their softmax: calibrated as they are."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 5))
    draws = rng.random((4000, 1))
    return logits, (softmax(logits, axis=1).cumsum(axis=1) < draws).sum(axis=1)


def test_errors_agree_with_scikit_learn(predictions):
    logits, labels = predictions
    p = softmax(logits, axis=1)
    assert accuracy(logits, labels) == np.mean(p.argmax(axis=1) == labels)
    assert cross_entropy(logits, labels) == pytest.approx(log_loss(labels, p))
    ones = [brier_score_loss(labels == k, p[:, k]) for k in range(5)]
    assert brier_score(logits, labels) == pytest.approx(sum(ones))
    sure = np.array([[1e4, 0.0]])  # p = 0 in float64
    assert cross_entropy(sure, np.array([1])) == 1e4
    assert brier_score(sure, np.array([1])) == 2


def with_confidence(confidence) -> np.ndarray:
    """Logits of two classes whose first has these probabilities, 1/2 and more."""
    p = np.asarray(confidence)
    return np.log(np.stack([p, 1 - p], axis=1))


def test_calibration_error_of_a_known_answer():
    # (1/2, 3/4] has the confidences 0.6 and 0.7, one of them right; (3/4, 1] has 0.8, 0.9 and 0.9,
    # all of them right.
    logits = with_confidence([0.6, 0.7, 0.8, 0.9, 0.9])
    found = reliability(logits, np.array([0, 1, 0, 0, 0]), bins=4)
    np.testing.assert_allclose(found.confidence, [0.65, 2.6 / 3])
    np.testing.assert_allclose(found.accuracy, [0.5, 1])
    np.testing.assert_allclose(found.share, [0.4, 0.6])
    expected = 0.4 * 0.15 + 0.6 * (1 - 2.6 / 3)
    assert found.expected_calibration_error == pytest.approx(expected)


def test_an_edge_belongs_to_the_bin_below():
    # Exact in binary: the softmax of equal logits is 1/K.
    half, quarter = np.zeros((1, 2)), np.zeros((1, 4))
    labels = np.zeros(1, int)
    for logits, confidence in ((half, 0.5), (quarter, 0.25)):
        both = np.concatenate([logits, logits + [1e-9, *[0] * (logits.shape[1] - 1)]])
        found = reliability(both, labels.repeat(2), bins=4)
        np.testing.assert_allclose(found.confidence, confidence)
        np.testing.assert_allclose(found.share, [0.5, 0.5])


def test_there_are_15_bins_of_equal_width(predictions):
    logits, labels = predictions
    p = softmax(logits, axis=1).max(axis=1)
    error = 0.0
    for m in range(1, 16):
        inside = ((m - 1) / 15 < p) & (p <= m / 15)
        right = (logits.argmax(axis=1) == labels)[inside]
        error += abs(right.sum() - p[inside].sum()) / len(p)
    assert reliability(logits, labels).expected_calibration_error == pytest.approx(error)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_the_temperature_undoes_a_factor_of_calibrated_logits(predictions, factor):
    logits, labels = predictions
    found = fit_temperature(factor * logits, labels)
    assert found == pytest.approx(factor, rel=0.05)
    scaled = factor * logits / found
    assert reliability(scaled, labels).expected_calibration_error < 0.02
    for other in (0.98, 1.02):  # it is the minimum
        assert cross_entropy(scaled, labels) < cross_entropy(scaled / other, labels)


def test_the_temperature_stays_in_its_range_where_it_has_no_best_value():
    logits, right, wrong = np.eye(3) * 5, np.arange(3), np.array([1, 2, 0])
    lowest = fit_temperature(logits, right)
    assert 0.01 <= lowest < 0.3 and cross_entropy(logits / lowest, right) < 1e-6
    assert 50 < fit_temperature(logits, wrong) <= 100


def test_unlabelled_rows_are_left_out_and_attributes_have_two_classes():
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    rows, labels = labelled_rows(logits, np.array([0, -1, 2, -1, 1, 1]))
    np.testing.assert_array_equal(rows, logits[[0, 2, 4, 5]])
    np.testing.assert_array_equal(labels, [0, 2, 1, 1])

    entries = np.array([[1, 0, -1]] * 6, np.int8)
    rows, labels = labelled_rows(logits, entries)
    np.testing.assert_array_equal(labels, [1, 0] * 6)
    np.testing.assert_allclose(softmax(rows, axis=1)[:, 1], expit(logits[:, :2]).ravel())
    p = expit(logits[:, :2].astype(np.float64))
    expected = log_loss(labels, p.ravel())
    assert cross_entropy(rows, labels) == pytest.approx(expected)
