"""The default head. A row of its logits depends on nothing but that row."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdm.arrays import Times
from jdm.nn.layers import Dense, Dropout, LayerNorm
from jdm.nn.unet import Features


class NormalisedHead(nn.Module):
    """Layer-normalised means of the representations, a hidden layer with the time, a linear layer.

    Each representation's mean is normalised separately, so that none outweighs the others. The time
    enters as the UNet's embedding. width: units of the hidden layer. Computes in float32.
    """

    num_classes: int
    width: int
    dropout: float

    @nn.compact
    def __call__(
        self, features: Features, t: Times, embedding: Float[Array, "b d"], train: bool
    ) -> Float[Array, "b k"]:
        h = jnp.concatenate([LayerNorm()(z) for z in features.means()], axis=-1)
        h = Dense(self.width, name="in")(h)
        h = h + Dense(self.width, name="time")(nn.silu(embedding.astype(jnp.float32)))
        h = nn.silu(LayerNorm(name="norm")(h))
        h = Dropout(self.dropout)(h, train)
        return Dense(self.num_classes, name="out")(h)


HEAD = NormalisedHead
