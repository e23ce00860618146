"""The UNet of Dhariwal & Nichol 2021, as used by Deja et al. 2023, as an encoder and a decoder.

The encoder maps (x, t) to Features: the bottleneck `mid` and every skip connection in encoder
order. The decoder maps Features to an image-shaped output. In between, a classifier can read the
features, and guidance can change them. Images are [B, H, W, C]; t is int32 [B].
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdm import names
from jdm.arrays import Images, Times
from jdm.errors import InvalidValue
from jdm.nn.attention import ATTENTIONS
from jdm.nn.layers import LECUN_NORMAL, ZEROS, Conv, Dense, Dropout, GroupNorm


class Features(NamedTuple):
    """The hidden representations Z of one encoder pass, or other values in the same structure.

    mid: the bottleneck [B, h, w, c]. skips: one array per encoder block, in encoder order.
    """

    mid: Any
    skips: tuple[Any, ...]

    def means(self) -> list[Float[Array, "b _"]]:
        """The spatial mean of `mid`, then those of the skips: float32 [B, channels] each."""
        return [z.astype(jnp.float32).mean(axis=(1, 2)) for z in (self.mid, *self.skips)]


def level_sizes(image_size: int, levels: int) -> tuple[int, ...]:
    """Each level's side length: (28, 14, 7) for 28. Raises InvalidValue if one cannot be halved."""
    factor = 2 ** (levels - 1)
    if image_size % factor:
        needed = f"{levels} levels of config.model.multipliers need"
        allowed = f"does not divide by {factor}, as {needed}"
        raise InvalidValue("config.model.image_size", image_size, allowed)
    return tuple(image_size // 2**level for level in range(levels))


def block_names(levels: int, blocks: int) -> Features:
    """The name of the module that computes each representation, in the structure of Features."""
    skips = ["stem"]
    for level in range(levels):
        skips += [f"encoder_{level}_{block}" for block in range(blocks)]
        skips += [f"down_{level}"] * (level < levels - 1)
    return Features("mid", tuple(skips))


def time_embedding(t: Times, width: int) -> Float[Array, "b width"]:
    """Sinusoids of the integer t, cosines first: frequencies exp(-ln 10000 · i / (width/2))."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Norm(nn.Module):
    """GroupNorm in float32, with the largest number of groups ≤ 32 that divides the channels."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)
        return GroupNorm(groups, epsilon=1e-5, name="norm")(x).astype(self.dtype)


def conv3x3(channels: int, dtype, *, stride: int = 1, zero: bool = False, name=None) -> Conv:
    """3×3 convolution, padded by 1 on every side at any stride. zero: the kernel starts as 0."""
    return Conv(channels, 3, dtype, stride, ZEROS if zero else LECUN_NORMAL, name=name)


RESIZES = {
    "none": lambda x: x,
    "up": lambda x: x.repeat(2, axis=1).repeat(2, axis=2),
    "down": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
}


# How a residual block reads the time: (numbers for each channel, function of the block's second
# normalisation, its input h and these numbers).
TIME_CONDITIONINGS = names.TIME_CONDITIONINGS.records(
    scale_shift=(2, lambda norm, h, scale, shift: norm(h) * (1 + scale) + shift),
    add=(1, lambda norm, h, shift: norm(h + shift)),
)


class ConvResample(nn.Module):
    """Between levels: a convolution with stride 2 ("down"), or pixels repeated, then one ("up").

    Has the fields and arguments of `ResBlock`, but uses neither dropout, embedding, conditioning
    nor train.
    """

    channels: int
    dropout: float
    dtype: jnp.dtype
    resize: str = "none"
    conditioning: str = "scale_shift"

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        x, stride = (RESIZES["up"](x), 1) if self.resize == "up" else (x, 2)
        return conv3x3(self.channels, self.dtype, stride=stride, name="conv")(x)


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, resize, conv, norm with the time, SiLU, conv.

    resize: one of RESIZES; it also resizes the shortcut. conditioning: one of TIME_CONDITIONINGS,
    a scale and shift after the second norm, or a shift before it.
    """

    channels: int
    dropout: float
    dtype: jnp.dtype
    resize: str = "none"
    conditioning: str = "scale_shift"

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        resize = RESIZES[self.resize]
        h = resize(nn.silu(Norm(self.dtype, name="norm_in")(x)))
        h = conv3x3(self.channels, self.dtype, name="conv_in")(h)
        count, conditioned = TIME_CONDITIONINGS[self.conditioning]
        width = count * self.channels
        modulation = Dense(width, self.dtype, name="time")(nn.silu(embedding))
        numbers = jnp.split(modulation[:, None, None, :], count, axis=-1)
        h = nn.silu(conditioned(Norm(self.dtype, name="norm_out"), h, *numbers))
        h = Dropout(self.dropout)(h, train)
        h = conv3x3(self.channels, self.dtype, zero=True, name="conv_out")(h)
        x = resize(x)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, 1, self.dtype, name="shortcut")(x)
        return x + h


# What changes the resolution between levels.
RESAMPLES = names.RESAMPLES.records({"conv": ConvResample, "resblock": ResBlock})


class Attention(nn.Module):
    """Residual self-attention over positions. order: of attention.ATTENTION_ORDERS.

    implementation: of attention.ATTENTIONS.
    """

    heads: int
    dtype: jnp.dtype
    order: str = "head_first"
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        qkv = Dense(3 * c, self.dtype, name="qkv")(Norm(self.dtype, name="norm")(x))
        qkv = qkv.reshape(b, height * width, 3 * c)
        out = ATTENTIONS[self.implementation].attend(qkv, self.heads, self.order).reshape(x.shape)
        return x + Dense(c, self.dtype, ZEROS, name="project")(out)


class Block(nn.Module):
    """A residual block, then attention if `attention` is true.

    remat_attention: whether the gradient computes the attention again.
    """

    channels: int
    dropout: float
    dtype: jnp.dtype
    heads: int = 1
    attention: bool = False
    order: str = "head_first"
    attention_implementation: str = "auto"
    conditioning: str = "scale_shift"
    remat_attention: bool = False

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        block = (self.channels, self.dropout, self.dtype, "none", self.conditioning)
        x = ResBlock(*block, name="residual")(x, embedding, train)
        if self.attention:
            fields = self.heads, self.dtype, self.order, self.attention_implementation
            x = (nn.remat(Attention) if self.remat_attention else Attention)(
                *fields, name="attention"
            )(x)
        return x


class UNet(nn.Module):
    """The encoder and the decoder, which has one residual block more at each level.

    out_channels: channels of the output. dtype: of the computation; parameters are float32. The
    other fields are keys of config.model and config.exec, which jdm.configs.base describes.
    """

    image_size: int
    out_channels: int
    channels: int
    multipliers: Sequence[int]
    blocks: int
    attention: Sequence[int]
    heads: int
    dropout: float
    dtype: jnp.dtype
    head_channels: int = 0
    resample: str = "conv"
    time_conditioning: str = "scale_shift"
    attention_order: str = "head_first"
    attention_implementation: str = "auto"
    remat: str = "none"

    def setup(self):
        sizes = level_sizes(self.image_size, len(self.multipliers))
        widths = [self.channels * m for m in self.multipliers]
        last = len(sizes) - 1
        again = functools.partial(nn.remat, static_argnums=(3,))  # argument 3 is `train`, a bool
        remat = again if self.remat == "blocks" else lambda cls: cls

        def block(level, attends):
            width = widths[level]
            heads = width // self.head_channels if self.head_channels else self.heads
            attention = heads, attends, self.attention_order, self.attention_implementation
            fields = *attention, self.time_conditioning, self.remat == "attention"
            return remat(Block)(width, self.dropout, self.dtype, *fields)

        def level_blocks(level, count):
            return [block(level, sizes[level] in self.attention) for _ in range(count)]

        def resample(level, resize):
            fields = widths[level], self.dropout, self.dtype, resize, self.time_conditioning
            return remat(RESAMPLES[self.resample])(*fields)

        self.time_in = Dense(4 * self.channels, self.dtype)
        self.time_out = Dense(4 * self.channels, self.dtype)
        self.stem = conv3x3(widths[0], self.dtype)
        self.encoder = [level_blocks(level, self.blocks) for level in range(last + 1)]
        self.down = [resample(level, "down") for level in range(last)]
        self.mid_in = block(last, attends=True)
        self.mid_out = block(last, attends=False)
        self.decoder = [level_blocks(level, self.blocks + 1) for level in range(last + 1)]
        self.up = [resample(level, "up") for level in range(1, last + 1)]
        self.norm = Norm(self.dtype)
        self.out = conv3x3(self.out_channels, self.dtype, zero=True)

    def embed(self, t: Times) -> Float[Array, "b d"]:
        """The time embedding [B, 4 · channels] that every block reads."""
        embedding = time_embedding(t, self.channels).astype(self.dtype)
        return self.time_out(nn.silu(self.time_in(embedding)))

    def encode(
        self, x: Images, t: Times, perturbations: Features | None = None, train: bool = False
    ) -> Features:
        """The hidden representations of x at noise level t.

        perturbations: added to each representation before later blocks read it. At 0, the gradient
        of a function of the features with respect to them is the total derivative with respect to
        the representations.
        """
        embedding = self.embed(t)
        skips: list[Array] = []

        def keep(h):
            skips.append(h if perturbations is None else h + perturbations.skips[len(skips)])
            return skips[-1]

        h = keep(self.stem(x.astype(self.dtype)))
        for level, blocks in enumerate(self.encoder):
            for block in blocks:
                h = keep(block(h, embedding, train))
            if level < len(self.down):
                h = keep(self.down[level](h, embedding, train))
        h = self.mid_out(self.mid_in(h, embedding, train), embedding, train)
        if perturbations is not None:
            h = h + perturbations.mid
        return Features(h, tuple(skips))

    def decode(self, features: Features, t: Times, train: bool = False) -> Images:
        """The output, float32 [B, H, W, out_channels], for representations at noise level t."""
        embedding = self.embed(t)
        h, skips = features.mid, list(features.skips)
        for level, blocks in reversed(list(enumerate(self.decoder))):
            for block in blocks:
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), embedding, train)
            if level > 0:
                h = self.up[level - 1](h, embedding, train)
        return self.out(nn.silu(self.norm(h))).astype(jnp.float32)
