"""Evaluators: measures of a trained model on a split, one file for each name.

Each file defines EVALUATOR, a function (joint, split, options) -> iterator of (name, value). The
call checks what the evaluator needs, and the values are computed as the iterator is read.
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

    Raises InvalidValue for an unknown name and for what an evaluator cannot use, before anything is
    computed.
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

    found = {name: EVALUATORS[name](joint, split, options) for name in metrics}

    def values(name: str) -> dict[str, Value]:
        with fixed_flags():
            return dict(found[name])

    return ((name, values(name)) for name in metrics)
