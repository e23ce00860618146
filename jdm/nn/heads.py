"""Classifier heads: logits from the hidden representations of one encoder pass.

Owns the heads and their names, HEADS; each is made of (num_classes, width, dropout) and called
with (features, t, embedding, train). Does not know the encoder, nor which inputs it was given.

A head computes in float32 on the spatial mean of every representation, the bottleneck first and
then every skip in encoder order.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdm.nn.unet import Features


def pooled_means(features: Features) -> list[Float[Array, "b _"]]:
    """The spatial means of `mid` and of every skip, float32 [B, channels]."""
    return [z.astype(jnp.float32).mean(axis=(1, 2)) for z in (features.mid, *features.skips)]


class NormalisedHead(nn.Module):
    """A head that is meaningful at every noise level.

    Each block's mean is normalised on its own, so that no block drowns the others; the time
    enters through the embedding the blocks share, never as a raw number; nothing depends on the
    batch. width: of the hidden layer.
    """

    num_classes: int
    width: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        features: Features,
        t: Int[Array, " b"],
        embedding: Float[Array, "b d"],
        train: bool,
    ) -> Float[Array, "b k"]:
        h = jnp.concatenate([nn.LayerNorm()(z) for z in pooled_means(features)], axis=-1)
        h = nn.Dense(self.width, name="in")(h)
        h = h + nn.Dense(self.width, name="time")(nn.silu(embedding.astype(jnp.float32)))
        h = nn.silu(nn.LayerNorm(name="norm")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.num_classes, name="out")(h)


class BatchNorm(nn.Module):
    """Normalisation over the batch, with the running statistics of PyTorch's BatchNorm1d.

    Of x [B, D] in training: the batch's own mean and (biased) variance, while the collection
    batch_stats moves a tenth of the way to that mean and to the unbiased variance, and counts.
    Elsewhere: the running ones. The batch is the global one, however many devices share it.

    Raises ValueError for a batch of one in training, which has no variance.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool) -> Float[Array, "b d"]:
        rows, width = x.shape
        mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        variance = self.variable("batch_stats", "var", jnp.ones, (width,))
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        here = (mean.value, variance.value)
        if train:
            if rows < 2:
                raise ValueError(
                    "data.batch_size=1 is too few for model.head='published', which normalises "
                    "over the batch; 2 or more are allowed"
                )
            here = (x.mean(axis=0), x.var(axis=0))
            mean.value = 0.9 * mean.value + 0.1 * here[0]
            variance.value = 0.9 * variance.value + 0.1 * here[1] * rows / (rows - 1)
            count.value = count.value + 1
        return (x - here[0]) * jax.lax.rsqrt(here[1] + 1e-5) * scale + bias


class PublishedHead(nn.Module):
    """The head of the published implementation, to the letter (Deja et al. 2023).

    The means and t itself as one more number, F + 1 in all, then dropout, BatchNorm, Linear to
    F // 2, leaky ReLU, dropout, BatchNorm, Linear. width is not used: the hidden layer has its own.

    Its fault: trained as published, on clean images, it only ever sees t = 0. The running variance
    of that constant input decays to 0, so at t > 0 that one input is t / sqrt(1e-5), 316 times the
    raw number, which drowns all else, and the class is the same for every image. model.head_time =
    "zero" feeds it t = 0 at every noise level instead. (Dropout before BatchNorm is published
    too: it makes the statistics of training differ from those of use.)
    """

    num_classes: int
    width: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        features: Features,
        t: Int[Array, " b"],
        embedding: Float[Array, "b d"],
        train: bool,
    ) -> Float[Array, "b k"]:
        h = jnp.concatenate([*pooled_means(features), t.astype(jnp.float32)[:, None]], axis=-1)
        hidden = (h.shape[-1] - 1) // 2
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.Dense(hidden, name="in")(BatchNorm(name="norm_in")(h, train))
        h = nn.leaky_relu(h, 0.01)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.num_classes, name="out")(BatchNorm(name="norm_out")(h, train))


HEADS = {"normalised": NormalisedHead, "published": PublishedHead}

# The time that a head is given: that of its input, or 0 whatever that is.
HEAD_TIMES = {"raw": lambda t: t, "zero": jnp.zeros_like}
