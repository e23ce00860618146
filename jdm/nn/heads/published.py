"""The head of the published code of Deja et al. 2023, with batch normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdm.arrays import Times
from jdm.errors import InvalidValue
from jdm.nn.layers import ONES, ZEROS, Dense, Dropout, Layer
from jdm.nn.unet import Features


class BatchNorm(Layer):
    """PyTorch's BatchNorm1d, over the batch of all devices.

    x: [B, D]. In training it normalises by the mean and the biased variance of the batch, and moves
    the running statistics (collection batch_stats) by a tenth towards that mean and the unbiased
    variance; `count` is the number of such updates. Otherwise it uses the running statistics.
    Raises InvalidValue for a batch of one row in training, which has no unbiased variance.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool) -> Float[Array, "b d"]:
        rows, width = x.shape
        mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        variance = self.variable("batch_stats", "var", jnp.ones, (width,))
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        scale = self.weight("scale", ONES, (width,))
        bias = self.weight("bias", ZEROS, (width,))
        used = (mean.value, variance.value)
        if train:
            if rows < 2:
                allowed = "is too few for config.model.head='published', which normalises over rows"
                raise InvalidValue("config.data.batch_size", rows, allowed, "2 or more are allowed")
            used = (x.mean(axis=0), x.var(axis=0))
            mean.value = 0.9 * mean.value + 0.1 * used[0]
            variance.value = 0.9 * variance.value + 0.1 * used[1] * rows / (rows - 1)
            count.value = count.value + 1
        return (x - used[0]) * jax.lax.rsqrt(used[1] + 1e-5) * scale + bias


class PublishedHead(nn.Module):
    """Two linear layers, each after dropout and batch normalisation, as published.

    The inputs are the F means of the representations, and t as a number. The hidden layer has
    F // 2 units with leaky ReLU; `width` is not used. Computes in float32.

    It has two faults. Trained on clean images, as published, it sees only t = 0, and the running
    variance of the input t decays to 0. At t > 0 this input becomes t / sqrt(1e-5) = 316 t, which
    outweighs all others, and every image gets the same class; config.model.head_time = "zero"
    avoids this. Dropout before batch normalisation makes its statistics differ outside training.
    """

    num_classes: int
    width: int
    dropout: float

    @nn.compact
    def __call__(
        self, features: Features, t: Times, embedding: Float[Array, "b d"], train: bool
    ) -> Float[Array, "b k"]:
        h = jnp.concatenate([*features.means(), t.astype(jnp.float32)[:, None]], axis=-1)
        hidden = (h.shape[-1] - 1) // 2
        h = Dropout(self.dropout)(h, train)
        h = Dense(hidden, name="in")(BatchNorm(name="norm_in")(h, train))
        h = nn.leaky_relu(h, 0.01)
        h = Dropout(self.dropout)(h, train)
        return Dense(self.num_classes, name="out")(BatchNorm(name="norm_out")(h, train))


HEAD = PublishedHead
