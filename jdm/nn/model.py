"""The joint model: one encoder, followed by a decoder and by a classifier.

Owns the functions `encode`, `decode`, `classify` and `predict`, from which losses, samplers and
guidance are built. What the raw output stands for is defined in jdm.diffusion.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from jdm import names
from jdm.arrays import Images, Times
from jdm.errors import InvalidValue
from jdm.nn.attention import ATTENTION_ORDERS, ATTENTIONS
from jdm.nn.heads import HEAD_TIMES, HEADS
from jdm.nn.unet import (
    RESAMPLES,
    TIME_CONDITIONINGS,
    Features,
    UNet,
    level_sizes,
)
from jdm.numerics import key_of

Raw = Float[Array, "b h w c2"]  # float32, C channels, or 2C with learned variance
Logits = Float[Array, "b k"]  # float32

# The fields that the model and its UNet share.
UNET = "image_size channels multipliers blocks attention heads head_channels dropout".split()
UNET += "resample time_conditioning attention_order attention_implementation remat".split()


class JointModel(nn.Module):
    """A UNet diffusion model and a classifier that share the UNet's encoder.

    The fields are the keys of config.model, and of config.exec dtype, attention and remat (see
    `make_model`).
    Images are [B, S, S, C] with S = image_size and C = image_channels; t is int32 [B] in [0, T).
    K = num_classes: the logits are those of one class among K, or with multi_label of K independent
    attributes. Parameters are float32, whatever the dtype of the computation. `classify` updates
    the collection batch_stats, the running statistics of a head that has any.

    Raises InvalidValue for a field that `check_shape` refuses.
    """

    image_size: int
    image_channels: int
    num_classes: int
    multi_label: bool
    channels: int
    multipliers: Sequence[int]
    blocks: int
    attention: Sequence[int]
    heads: int
    head_channels: int
    dropout: float
    learned_variance: bool
    resample: str
    time_conditioning: str
    attention_order: str
    head: str
    head_time: str
    head_width: int
    head_dropout: float
    dtype: str
    attention_implementation: str
    remat: str

    def setup(self):
        check_shape(self)
        out_channels = self.image_channels * (2 if self.learned_variance else 1)
        shared = {name: getattr(self, name) for name in UNET}
        self.unet = UNet(out_channels=out_channels, dtype=jnp.dtype(self.dtype), **shared)
        fields = self.num_classes, self.head_width, self.head_dropout
        self.classifier = HEADS[self.head](*fields, name="head")

    def encode(
        self, x: Images, t: Times, perturbations: Features | None = None, train: bool = False
    ) -> Features:
        """The hidden representations of x at noise level t; for perturbations see `UNet.encode`."""
        return self.unet.encode(x, t, perturbations, train)

    def decode(self, features: Features, t: Times, train: bool = False) -> Raw:
        """The raw output, float32 [B, H, W, C], or [B, H, W, 2C] with learned variance."""
        return self.unet.decode(features, t, train)

    def classify(self, features: Features, t: Times, train: bool = False) -> Logits:
        """The logits, float32 [B, K], from representations of images at noise level t."""
        t = HEAD_TIMES[self.head_time](t)
        return self.classifier(features, t, self.unet.embed(t), train)

    def predict(self, x: Images, t: Times, train: bool = False) -> tuple[Raw, Logits]:
        """(raw output, logits) from one encoder pass."""
        features = self.encode(x, t, train=train)
        return self.decode(features, t, train), self.classify(features, t, train)

    __call__ = predict


def make_model(model: ConfigDict, exec: ConfigDict) -> JointModel:
    """The model of a config's sections `model` (what it is) and `exec` (how it is computed)."""
    how = dict(dtype=exec["dtype"], attention_implementation=exec["attention"], remat=exec["remat"])
    return JointModel(**model, **how)


def example_inputs(model: JointModel) -> tuple[Float[Array, "1 s s c"], Int[Array, "1"]]:
    """(x, t) of zeros, x [1, S, S, C] and t [1], for `model.init`."""
    side = model.image_size
    return jnp.zeros((1, side, side, model.image_channels), jnp.float32), jnp.zeros((1,), jnp.int32)


@functools.cache  # a network takes up to a second to trace
def weight_shapes(model: JointModel) -> dict[str, Any]:
    """{params and, with the published head, batch_stats} as shapes and dtypes; do not change it.

    Raises InvalidValue for a field that `check_shape` refuses.
    """
    return jax.eval_shape(model.init, key_of(0), *example_inputs(model))


def check_shape(model: JointModel) -> None:
    """Raises InvalidValue, naming the config key, for unknown names and sizes that do not fit."""
    sizes = level_sizes(model.image_size, len(model.multipliers))
    for side in model.attention:
        if side not in sizes:
            allowed = f"contains {side}, which is no level's side length"
            hint = f"the levels of config.model.image_size={model.image_size} are {sizes}"
            raise InvalidValue("config.model.attention", tuple(model.attention), allowed, hint)
    names.check_name("config.exec.dtype", model.dtype, names.DTYPES)
    implementation = model.attention_implementation
    names.check_name("config.exec.attention", implementation, ATTENTIONS)
    for level, side in enumerate(sizes):
        width = model.channels * model.multipliers[level]
        # The middle blocks have the width of the last level, and one always has attention.
        if side not in model.attention and level < len(sizes) - 1:
            continue
        key = "head_channels" if model.head_channels else "heads"
        if width % getattr(model, key):
            allowed = f"does not divide the {width} channels of the level of {side}×{side}"
            raise InvalidValue(f"config.model.{key}", getattr(model, key), allowed)
        of_head = model.head_channels or width // model.heads
        shape = side * side, width // of_head, of_head
        if why := ATTENTIONS[implementation].why_not(model.dtype, *shape):
            raise InvalidValue("config.exec.attention", implementation, why)
    names.check_name("config.model.resample", model.resample, RESAMPLES)
    conditioning = "config.model.time_conditioning"
    names.check_name(conditioning, model.time_conditioning, TIME_CONDITIONINGS)
    names.check_name("config.model.attention_order", model.attention_order, ATTENTION_ORDERS)
    names.check_name("config.model.head", model.head, HEADS)
    names.check_name("config.model.head_time", model.head_time, HEAD_TIMES)
