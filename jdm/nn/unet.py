"""The UNet: an encoder to hidden representations, and a decoder from them.

Owns the layers. Does not know what its output stands for, nor that there are classes.

The encoder maps (x, t) to Features: the bottleneck `mid` and every `skip`, in the order they are
made. The decoder maps Features to an image-shaped output. Between the two anything may be read
off the features or done to them; that is what the joint model is about.

The network is that of Dhariwal & Nichol 2021, as the joint diffusion models of Deja et al. 2023
use it. Arrays are [B, H, W, C]; t is int32 [B].
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ATTENTION_ORDERS = ("head_first", "qkv_first")
RESAMPLES = ("conv", "resblock")


class Features(NamedTuple):
    """The hidden representations Z of one encoder pass, or anything shaped like them.

    mid: the bottleneck [B, h, w, c]. skips: one array per encoder block, in encoder order.
    """

    mid: Array
    skips: tuple[Array, ...]


def level_sizes(image_size: int, levels: int) -> tuple[int, ...]:
    """Side length of the feature maps of each level. A 28-pixel image has 28, 14, 7.

    Raises ValueError where a level would not halve evenly.
    """
    if image_size % 2 ** (levels - 1):
        raise ValueError(
            f"model.image_size={image_size} does not divide by {2 ** (levels - 1)}, "
            f"as {levels} levels of model.multipliers need"
        )
    return tuple(image_size // 2**level for level in range(levels))


def block_names(levels: int, blocks: int) -> Features:
    """The names of the representations, in their places; those of the parameters that made them."""
    skips = ["stem"]
    for level in range(levels):
        skips += [f"encoder_{level}_{block}" for block in range(blocks)]
        skips += [f"down_{level}"] * (level < levels - 1)
    return Features("mid", tuple(skips))


def time_embedding(t: Int[Array, " b"], width: int) -> Float[Array, "b width"]:
    """Sinusoids of the integer t, cosines first: frequencies exp(-ln 10000 · i / (width/2))."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class GroupNorm(nn.Module):
    """GroupNorm with the most groups, up to 32, that divide the channels; statistics in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)
        norm = nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=jnp.float32, name="norm")
        return norm(x).astype(self.dtype)


def conv3x3(channels: int, dtype, *, stride: int = 1, zero: bool = False, name=None) -> nn.Conv:
    """3×3 convolution with padding 1 on every side, also at stride 2; zero: starts as 0."""
    init = nn.initializers.zeros if zero else nn.linear.default_kernel_init
    return nn.Conv(
        channels, (3, 3), stride, padding=((1, 1), (1, 1)), kernel_init=init, dtype=dtype, name=name
    )


def nearest_up(x: Float[Array, "b h w c"]) -> Array:
    """Each pixel twice along height and width."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def average_down(x: Float[Array, "b h w c"]) -> Array:
    """The mean of each 2×2 square."""
    return nn.avg_pool(x, (2, 2), (2, 2))


RESIZES = {"none": lambda x: x, "up": nearest_up, "down": average_down}


class Resample(nn.Module):
    """Between levels: a stride-2 convolution "down", or nearest ×2 and a convolution "up"."""

    channels: int
    direction: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        if self.direction == "up":
            return conv3x3(self.channels, self.dtype, name="conv")(nearest_up(x))
        return conv3x3(self.channels, self.dtype, stride=2, name="conv")(x)


class ResBlock(nn.Module):
    """norm · SiLU · (resize) · conv, then norm scaled and shifted by the time · SiLU · conv."""

    channels: int
    dropout: float
    dtype: jnp.dtype
    resize: str = "none"

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        resize = RESIZES[self.resize]
        h = resize(nn.silu(GroupNorm(self.dtype, name="norm_in")(x)))
        h = conv3x3(self.channels, self.dtype, name="conv_in")(h)
        modulation = nn.Dense(2 * self.channels, dtype=self.dtype, name="time")(nn.silu(embedding))
        scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        h = nn.silu(GroupNorm(self.dtype, name="norm_out")(h) * (1 + scale) + shift)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3x3(self.channels, self.dtype, zero=True, name="conv_out")(h)
        x = resize(x)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over positions, residual.

    order: how the 3C output channels of the qkv projection are laid out: "head_first" as
    [head, (q, k, v), channel], "qkv_first" as [(q, k, v), head, channel].
    """

    heads: int
    dtype: jnp.dtype
    order: str = "head_first"

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        d = c // self.heads
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(GroupNorm(self.dtype, name="norm")(x))
        qkv = qkv.reshape(b, height * width, -1)
        if self.order == "head_first":
            q, k, v = jnp.moveaxis(qkv.reshape(b, -1, self.heads, 3, d), 3, 0)
        else:
            q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, self.heads, d), 2, 0)
        # Both are scaled before the product, which keeps it in range in half precision.
        q, k = q * d**-0.25, k * d**-0.25
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        zero = nn.initializers.zeros
        return x + nn.Dense(c, kernel_init=zero, dtype=self.dtype, name="project")(out)


class Block(nn.Module):
    """A residual block, followed by attention where `attention` asks for it."""

    channels: int
    dropout: float
    dtype: jnp.dtype
    heads: int = 1
    attention: bool = False
    order: str = "head_first"

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        x = ResBlock(self.channels, self.dropout, self.dtype, name="residual")(x, embedding, train)
        if self.attention:
            x = Attention(self.heads, self.dtype, self.order, name="attention")(x)
        return x


class UNet(nn.Module):
    """The encoder and decoder around shared hidden representations.

    image_size: side length of the input. out_channels: of the output. channels: of the first
    level; multipliers: one per level, times channels. blocks: residual blocks per level (the
    decoder has one more). attention: side lengths of the feature maps that get attention. heads:
    of each attention. resample: between levels a plain "conv", or a "resblock" that resizes inside.
    dtype: of the computation; parameters are float32. remat: the gradient computes the inside of
    each block again instead of keeping it, for less memory and more time.
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
    resample: str = "conv"
    attention_order: str = "head_first"
    remat: bool = False

    def setup(self):
        sizes = level_sizes(self.image_size, len(self.multipliers))
        widths = [self.channels * m for m in self.multipliers]
        last = len(sizes) - 1

        # `train`, the third argument after self, is no array.
        of = functools.partial(nn.remat, static_argnums=(3,)) if self.remat else lambda cls: cls

        def block(level, attends):
            return of(Block)(
                widths[level], self.dropout, self.dtype, self.heads, attends, self.attention_order
            )

        def level_blocks(level, count):
            return [block(level, sizes[level] in self.attention) for _ in range(count)]

        def resample(level, direction):
            if self.resample == "resblock":
                return of(ResBlock)(widths[level], self.dropout, self.dtype, direction)
            return Resample(widths[level], direction, self.dtype)

        self.time_in = nn.Dense(4 * self.channels, dtype=self.dtype)
        self.time_out = nn.Dense(4 * self.channels, dtype=self.dtype)
        self.stem = conv3x3(widths[0], self.dtype)
        self.encoder = [level_blocks(level, self.blocks) for level in range(last + 1)]
        self.down = [resample(level, "down") for level in range(last)]
        self.mid_in = block(last, attends=True)
        self.mid_out = block(last, attends=False)
        self.decoder = [level_blocks(level, self.blocks + 1) for level in range(last + 1)]
        self.up = [resample(level, "up") for level in range(1, last + 1)]
        self.norm = GroupNorm(self.dtype)
        self.out = conv3x3(self.out_channels, self.dtype, zero=True)

    def embed(self, t: Int[Array, " b"]) -> Float[Array, "b d"]:
        """The time embedding that every block reads [B, 4C]."""
        embedding = time_embedding(t, self.channels).astype(self.dtype)
        return self.time_out(nn.silu(self.time_in(embedding)))

    def encode(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        nudges: Features | None = None,
        train: bool = False,
    ) -> Features:
        """The hidden representations of x at noise level t.

        nudges: added to each representation as it is made, before later blocks read it. The
        gradient at zero nudges is then the total derivative with respect to the representations.
        """
        embedding = self.embed(t)
        skips = []

        def keep(h):
            if nudges is not None:
                h = h + nudges.skips[len(skips)]
            skips.append(h)
            return h

        h = keep(self.stem(x.astype(self.dtype)))
        for level, blocks in enumerate(self.encoder):
            for block in blocks:
                h = keep(block(h, embedding, train))
            if level < len(self.down):
                h = keep(self.down[level](h, embedding, train))
        h = self.mid_out(self.mid_in(h, embedding, train), embedding, train)
        if nudges is not None:
            h = h + nudges.mid
        return Features(h, tuple(skips))

    def decode(
        self, features: Features, t: Int[Array, " b"], train: bool = False
    ) -> Float[Array, "b h w c"]:
        """The output [B, H, W, out_channels], float32, of representations at noise level t."""
        embedding = self.embed(t)
        h, skips = features.mid, list(features.skips)
        for level, blocks in reversed(list(enumerate(self.decoder))):
            for block in blocks:
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), embedding, train)
            if level > 0:
                h = self.up[level - 1](h, embedding, train)
        return self.out(nn.silu(self.norm(h))).astype(jnp.float32)
