"""The joint model: one encoder, read by a decoder and by a classifier.

Owns the four functions everything else is built from: `encode`, `decode`, `classify`, `predict`.
Does not own what the raw output means (jdm.diffusion does), nor the layers (unet, heads).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdm.nn.heads import HEAD_TIMES, HEADS
from jdm.nn.unet import ATTENTION_ORDERS, RESAMPLES, Features, UNet, level_sizes

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}


class JointModel(nn.Module):
    """A UNet diffusion model and a classifier that share the UNet's encoder.

    image_size, image_channels: of the images [B, S, S, C]. num_classes: K. multi_label: whether the
    K logits are of K answers, yes or no, and not of one class among K; the network is the same. The
    rest of its shape is described at `UNet`. learned_variance doubles the output channels. head:
    one of HEADS; head_width, head_dropout: its hidden layer (where it has no width of its own) and
    dropout; head_time: the time it is given, one of HEAD_TIMES. dtype: "float32" or "bfloat16", of
    the computation; parameters are float32 either way.

    Where the head keeps batch statistics, they are the collection batch_stats, which changes in
    `classify` alone.

    Raises ValueError, naming the config key, for sizes that do not fit together.
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
    dropout: float
    learned_variance: bool
    resample: str
    attention_order: str
    head: str
    head_time: str
    head_width: int
    head_dropout: float
    dtype: str
    remat: bool

    def setup(self):
        check_shape(self)
        self.unet = UNet(
            image_size=self.image_size,
            out_channels=self.image_channels * (2 if self.learned_variance else 1),
            channels=self.channels,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=self.attention,
            heads=self.heads,
            dropout=self.dropout,
            dtype=DTYPES[self.dtype],
            resample=self.resample,
            attention_order=self.attention_order,
            remat=self.remat,
        )
        self.classifier = HEADS[self.head](
            self.num_classes, self.head_width, self.head_dropout, name="head"
        )

    def encode(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        nudges: Features | None = None,
        train: bool = False,
    ) -> Features:
        """The hidden representations of x at noise level t; see `UNet.encode` for nudges."""
        return self.unet.encode(x, t, nudges, train)

    def decode(
        self, features: Features, t: Int[Array, " b"], train: bool = False
    ) -> Float[Array, "b h w c2"]:
        """The raw output, float32 [B, H, W, C], or [B, H, W, 2C] with learned variance."""
        return self.unet.decode(features, t, train)

    def classify(
        self, features: Features, t: Int[Array, " b"], train: bool = False
    ) -> Float[Array, "b k"]:
        """Logits, float32 [B, K], of representations that were encoded at noise level t."""
        t = HEAD_TIMES[self.head_time](t)
        return self.classifier(features, t, self.unet.embed(t), train)

    def predict(
        self, x: Float[Array, "b h w c"], t: Int[Array, " b"], train: bool = False
    ) -> tuple[Float[Array, "b h w c2"], Float[Array, "b k"]]:
        """(raw output, logits) of one encoder pass."""
        features = self.encode(x, t, train=train)
        return self.decode(features, t, train), self.classify(features, t, train)

    __call__ = predict


def check_shape(model: JointModel) -> None:
    """Raises ValueError, in one sentence with the config key, where the sizes do not fit."""
    sizes = level_sizes(model.image_size, len(model.multipliers))
    for side in model.attention:
        if side not in sizes:
            raise ValueError(
                f"model.attention={tuple(model.attention)} asks for {side}, which no level has; "
                f"the levels of model.image_size={model.image_size} are {sizes}"
            )
    # The middle always attends, so the last level's width must divide too.
    for level, side in enumerate(sizes):
        width = model.channels * model.multipliers[level]
        attends = side in model.attention or level == len(sizes) - 1
        if attends and width % model.heads:
            raise ValueError(
                f"model.heads={model.heads} does not divide the {width} channels of the level of "
                f"{side}×{side}"
            )
    for key, known in (
        ("resample", RESAMPLES),
        ("attention_order", ATTENTION_ORDERS),
        ("head", HEADS),
        ("head_time", HEAD_TIMES),
        ("dtype", DTYPES),
    ):
        if getattr(model, key) not in known:
            raise ValueError(
                f"model.{key}={getattr(model, key)!r} is unknown; known: {', '.join(known)}"
            )
