"""What a term of the joint loss is, what it is given, and what it returns."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Key

from jdm.arrays import Images, Times
from jdm.nn.model import Logits, Raw

PerRow = Float[Array, " b"]
Keys = dict[str, Key[Array, ""]]  # a PRNG key for each stream of jdm.training.step

# int32 [B], or int8 [B, K] for a multi-label model; -1 stands for a label that is not known.
Labels = Int[Array, "b ..."]
Batch = dict[str, Array]  # {image: uint8 [B, H, W, C], label: Labels}

# {name: (sum, count)}: numbers to log. Sums and counts are added up over the parts of a batch and
# over steps, and divided once.
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


class Input(NamedTuple):
    """One image per row of the batch, as the encoder sees it.

    x: clean or noised images [B, H, W, C]. t: their noise levels, int32 [B]. label: their labels.
    partner, share: the label of the image that MixUp mixed in, and the share of that image, float32
    [B] in [0, 1] (15); None if labels are not mixed.
    """

    x: Images
    t: Times
    label: Labels
    partner: Labels | None = None
    share: PerRow | None = None


class Outputs(NamedTuple):
    """The decoder's and the classifier's output for one input; None if no term needs it.

    raw: float32 [B, H, W, C], or [B, H, W, 2C] with learned variance. logits: float32 [B, K].
    """

    raw: Raw | None
    logits: Logits | None


class Rows(NamedTuple):
    """A batch, ready for the network. Every array has one row per image.

    x0, eps: the clean images and the noise, [B, H, W, C]. inputs: what the encoder sees, by name.
    shares: for each term, the factor [B] of each row's value in the loss.
    """

    x0: Images
    eps: Images
    inputs: OrderedDict[str, Input]  # JAX sorts the keys of a plain dict, and the order matters
    shares: dict[str, PerRow]


class Term(NamedTuple):
    """A term of the joint loss (9). `loss` is the JointLoss: its model, diffusion and settings.

    shares: (loss, inputs, importance, step) -> the share of each row, float32 [B]. It gets the
    whole batch, so divide by sums over the batch here. importance: the weights (10c), float32 [B].
    step: the number of steps done before.
    values: (loss, rows, outputs) -> (the value of each row, float32 [B], metrics). It gets a batch
    or a part of one.
    check: (loss) -> None. Raises InvalidValue for settings that contradict each other, also if
    config.loss.terms leaves the term out.
    decodes, classifies: (loss) -> the names of the inputs whose raw output, or logits, it needs.
    """

    shares: Callable
    values: Callable
    check: Callable = lambda loss: None
    decodes: Callable = lambda loss: ()
    classifies: Callable = lambda loss: ()
