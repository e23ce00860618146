"""Evaluators: measures of a trained model on a split, one file for each name.

Each file defines EVALUATOR, a function (joint, split, options) -> iterator of (name, value).
"""

from collections.abc import Iterator, Sequence

from jdm import names
from jdm.analysis.evaluators.base import EvaluationOptions, Evaluator, Value
from jdm.data.splits import Split
from jdm.joint import Joint
from jdm.numerics import fixed_flags

EVALUATORS: dict[str, Evaluator] = names.EVALUATORS.modules(__name__, "EVALUATOR")


def evaluate(
    joint: Joint, metrics: Sequence[str], split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, Value]]:
    """(name, value) pairs of the evaluators of these names, one after the other.

    Raises InvalidValue for an unknown name, before anything is computed, and for a split that an
    evaluator cannot use.
    """
    each = evaluate_each(joint, metrics, split, options)
    return (pair for _, found in each for pair in found.items())


def evaluate_each(
    joint: Joint, metrics: Sequence[str], split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, dict[str, Value]]]:
    """(evaluator, {name: value}) of each of these evaluators, as soon as it is done; see
    `evaluate`."""
    for name in metrics:
        names.check_name("metrics", name, EVALUATORS)

    def values(name: str) -> dict[str, Value]:
        with fixed_flags():
            return dict(EVALUATORS[name](joint, split, options))

    return ((name, values(name)) for name in metrics)
