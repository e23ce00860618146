"""Logits of many images, clean or noised, and the noise of an image by its seed and index."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt, UInt8

from jdm.analysis.calibration import labelled_rows
from jdm.analysis.shares import in_shares
from jdm.data.splits import Split
from jdm.diffusion.process import pixels_to_float
from jdm.diffusion.samplers import image_noise
from jdm.errors import InvalidValue
from jdm.joint import Joint, logits_of
from jdm.mesh import in_batches
from jdm.numerics import fixed_flags, key_of


def image_keys(seed: UInt[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """The key of each image's noise, which depends on the seed and the index of the image alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, key_of(seed)))(index)


@functools.partial(jax.jit, static_argnums=0)
def _noised(diffusion, images, t, seed, index):
    x0 = pixels_to_float(images)
    noise = image_noise(image_keys(seed, index), diffusion.steps, x0.shape[1:])
    return diffusion.q_sample(x0, jnp.full(len(x0), t), noise)


@fixed_flags()
def image_logits(
    joint: Joint,
    images: UInt8[np.ndarray, "n h w c"],
    batch_size: int,
    t: int = 0,
    seed: int = 0,
    shared: bool = False,
) -> Float[np.ndarray, "n k"]:
    """The logits of images at noise level t, float32 [N, K].

    t: in [0, T); at 0 the images are clean, above it they are noised to level t. seed: in
    [0, 2**32), of the noise, which is the same at every t. batch_size: images in one forward pass;
    it does not change the result. shared: see `shares.in_shares`.
    """

    def of_batch(weights: Any, batch: Any, index: Any) -> Any:
        if t == 0:
            x = pixels_to_float(jnp.asarray(batch))
        else:
            x = _noised(joint.diffusion, batch, jnp.int32(t), jnp.uint32(seed), index)
        times = jnp.full(len(batch), t, jnp.int32)
        return logits_of(joint.model, weights, x, times)

    def logits(rows: slice) -> np.ndarray:
        index = np.arange(rows.start, rows.stop, dtype=np.int32)
        return in_batches(of_batch, joint.weights, [images[rows], index], batch_size)

    return in_shares(logits, len(images), shared)


def labelled_logits(
    joint: Joint, split: Split, batch_size: int, t: int = 0, seed: int = 0, shared: bool = False
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, " m"]]:
    """The logits and labels of all that is labelled, see `labelled_rows` and `image_logits`.

    Raises InvalidValue for a split without labels.
    """
    check_labelled(split)
    logits = image_logits(joint, split.images, batch_size, t, seed, shared)
    return labelled_rows(logits, split.labels)


def check_labelled(split: Split) -> None:
    """Raises InvalidValue for a split without labels."""
    if not (split.labels >= 0).any():
        raise InvalidValue("split", split.name, "has no labelled image")
