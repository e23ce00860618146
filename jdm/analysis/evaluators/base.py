"""The type of evaluators, and the options that they are given."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jdm.data.splits import Split
from jdm.joint import Joint


class EvaluationOptions(NamedTuple):
    """batch_size: images that the network evaluates at once; it does not change the values."""

    batch_size: int


Evaluator = Callable[[Joint, Split, EvaluationOptions], Iterator[tuple[str, float]]]
