"""The type of evaluators, the options that they are given, and the values that they yield."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdm.data.splits import Split
from jdm.diffusion.method import Method
from jdm.joint import Joint


class Curve(NamedTuple):
    """Lines over one axis. x: [N], the same for all lines. lines: {name: [N]}."""

    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]


class Table(NamedTuple):
    """Numbers by row and column: values[row][column]."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]


class Record(NamedTuple):
    """What is stored beside numbers, such as a protocol. values: ready for JSON."""

    values: Mapping[str, Any]


Value = float | Curve | Table | Record  # training logs the floats; reports show all


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What evaluators need beside the model and the split.

    batch_size: images that the network evaluates at once, on all devices of this host; it does not
    change the values. load: a function from the name of a split to that split of the same data set,
    for what is fitted on other images than those that are measured; None where there is none.
    other: images of another data set, which are out of distribution; their labels are not used.
    samples: the number of images to generate. method: how they are sampled. features: what
    distances between images are measured in, of names.EXTRACTORS. cache: the folder that keeps what
    is computed from real images, such as their features and reference classifiers; None is that of
    the model's data set. seed: of all draws. bound_steps: at how many of the T noise levels the
    variational bound of each image is computed; None is at all, which takes T forward passes an
    image. shared: whether all processes of a run evaluate together, with the same arguments, and
    share the images that go through a network, see `shares.in_shares`.
    """

    batch_size: int
    load: Callable[[str], Split] | None = None
    other: Split | None = None
    samples: int = 1000
    method: Method = Method()
    features: str = "reference"
    cache: Path | None = None
    seed: int = 0
    bound_steps: int | None = 50
    shared: bool = False


Evaluator = Callable[[Joint, Split, EvaluationOptions], Iterator[tuple[str, Value]]]
