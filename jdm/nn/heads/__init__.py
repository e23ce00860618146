"""Classifier heads: from the hidden representations of one encoder pass to logits [B, K].

Each file has one head, a module that is constructed as HEAD(num_classes, width, dropout) and called
as head(features, t, embedding, train), where `embedding` is the UNet's time embedding.
"""

import jax.numpy as jnp

from jdm import names

HEADS = names.HEADS.modules(__name__, "HEAD")

# What a head gets as its t: the noise level of its input, or always 0.
HEAD_TIMES = names.HEAD_TIMES.records({"raw": lambda t: t, "zero": jnp.zeros_like})
