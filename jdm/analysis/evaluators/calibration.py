"""Calibration: whether class probabilities are the frequencies of the classes.

The temperature is fitted on the split "validation" of the same data set (Guo et al. 2017).
"""

from collections.abc import Iterator

from jdm.analysis.calibration import (
    brier_score,
    cross_entropy,
    fit_temperature,
    reliability,
)
from jdm.analysis.evaluators.base import Curve, EvaluationOptions, Table, Value
from jdm.analysis.logits import check_labelled, labelled_logits
from jdm.data.splits import Split
from jdm.errors import InvalidValue
from jdm.joint import Joint

VALIDATION = "validation"


def calibration(
    joint: Joint, split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, Value]]:
    """Calibration on clean images at t = 0, as trained and with logits divided by a temperature.

    Yields "calibration_error", the expected calibration error in [0, 1]; "temperature";
    "calibration_error/scaled", with the temperature. The curves "reliability" and
    "reliability/scaled" give the accuracy in each bin of confidence, beside what it is if
    calibrated, and the share of predictions in the bin; empty bins are left out. The table
    "temperature_scaling" has the errors before and after. See jdm.analysis.calibration.

    Raises InvalidValue for a split without labels, and where options.load has no labelled split
    "validation".
    """
    check_labelled(split)
    fitted_on = _validation(options)
    check_labelled(fitted_on)
    return _values(joint, split, fitted_on, options)


def _values(
    joint: Joint, split: Split, fitted_on: Split, options: EvaluationOptions
) -> Iterator[tuple[str, Value]]:
    size, shared = options.batch_size, options.shared
    temperature = fit_temperature(*labelled_logits(joint, fitted_on, size, shared=shared))
    logits, labels = labelled_logits(joint, split, size, shared=shared)
    rows = []
    for suffix, scaled in (("", logits), ("/scaled", logits / temperature)):
        bins = reliability(scaled, labels)
        error = bins.expected_calibration_error
        rows.append([error, cross_entropy(scaled, labels), brier_score(scaled, labels)])
        yield f"calibration_error{suffix}", error
        confidence, measured = bins.confidence.tolist(), bins.accuracy.tolist()
        lines = {"accuracy": measured, "if calibrated": confidence, "share": bins.share.tolist()}
        yield f"reliability{suffix}", Curve("confidence", "", confidence, lines)
    yield "temperature", temperature
    columns = ("expected calibration error", "cross-entropy", "Brier score")
    yield "temperature_scaling", Table(("before", "after"), columns, rows)


def _validation(options: EvaluationOptions) -> Split:
    """The split that the temperature is fitted on. Raises InvalidValue where there is none."""
    needs = f"needs the split {VALIDATION!r} of the data set, to fit a temperature on"
    if options.load is None:
        raise InvalidValue("metrics", "calibration", needs)
    try:
        return options.load(VALIDATION)
    except InvalidValue as error:
        if error.parameter != "split":
            raise
        hint = "config.data.validation holds a share of the training images out as this split"
        raise InvalidValue("metrics", "calibration", needs, hint) from None


EVALUATOR = calibration
