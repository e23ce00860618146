"""Features of images: the spatial means of the joint model's hidden representations.

A block is a module of the UNet whose output is one array [B, h, w, c]: those of the encoder, `mid`,
and those of the decoder. They are named as `jdm sample --blocks` names them, and in the order in
which they are computed: stem, encoder_0_0, …, mid, decoder_1_0, ….
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jdm.diffusion.process import to_floats
from jdm.diffusion.samplers import image_noise
from jdm.errors import InvalidValue
from jdm.joint import Joint, as_joint, check_images, image_shape
from jdm.mesh import in_batches
from jdm.names import check_name
from jdm.nn.model import JointModel, example_inputs, weight_shapes
from jdm.numerics import fixed_flags, key_of
from jdm.options import POSITIVE, Option

# The middle has two blocks; its representation is the output of the second.
_PARTS = ("stem", "encoder_", "down_", "mid_out", "decoder_", "up_")


class BlockFeatures(NamedTuple):
    """values: float32 [N, D]. blocks: the name of the block of each of the D columns."""

    values: Float[np.ndarray, "n d"]
    blocks: tuple[str, ...]

    def of(self, block: str) -> Float[np.ndarray, "n c"]:
        """The columns of one block."""
        return self.values[:, np.array(self.blocks) == block]


@functools.cache
def widths(model: JointModel) -> dict[str, int]:
    """{block: its number of channels}, in the order in which blocks are computed."""
    shapes = jax.eval_shape(
        functools.partial(_means, model), weight_shapes(model), *example_inputs(model)
    )
    return {name: shapes[name].shape[1] for name in _in_order(shapes)}


def _means(model: JointModel, weights: Any, x, t) -> dict[str, Any]:
    """{block: the spatial mean of its output, float32 [B, c]}, for x at noise level t."""

    def is_block(module, method: str) -> bool:
        name = module.path[-1] if len(module.path) == 2 else ""
        return method == "__call__" and module.path[0] == "unet" and name.startswith(_PARTS)

    _, state = model.apply(weights, x, t, capture_intermediates=is_block, mutable="intermediates")
    found = {}
    for name, output in state["intermediates"]["unet"].items():
        (z,) = output["__call__"]
        found["mid" if name == "mid_out" else name] = z.astype(jnp.float32).mean(axis=(1, 2))
    return found


def _in_order(names: Any) -> list[str]:
    """The names of blocks in the order in which the UNet calls them."""
    levels = 1 + max(int(name.split("_")[1]) for name in names if name.startswith("encoder_"))

    def of(prefix: str) -> list[str]:
        return sorted(n for n in names if n.startswith(prefix))

    order = ["stem"]
    for level in range(levels):
        order += [*of(f"encoder_{level}_"), *of(f"down_{level}")]
    order.append("mid")
    for level in reversed(range(levels)):
        order += [*of(f"decoder_{level}_"), *([f"up_{level - 1}"] if level else [])]
    return order


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(model, diffusion, blocks, weights, x, t, seeds):
    noise = image_noise(key_of(seeds), diffusion.steps, image_shape(model))
    times = jnp.full(len(x), t)
    # t = 0 is the clean image, as for the classifier.
    noised = jnp.where(t == 0, x, diffusion.q_sample(x, times, noise))
    means = _means(model, weights, noised, times)
    return jnp.concatenate([means[name] for name in blocks], axis=1)


@fixed_flags()
def features(
    joint: Joint | str | os.PathLike,
    images: Any,
    t: int = 10,
    blocks: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> BlockFeatures:
    """The spatial means of hidden representations of images, at noise level t.

    images: uint8 [N, H, W, C], or floats in [-1, 1], see `jdm.classify`. t: in [0, T); at 0 the
    images are as they are, above it they are noised to level t, image i with the noise of seed +
    i. blocks: their names, see `jdm.analysis.features.widths`; None is all. batch_size: images
    in one forward pass; it does not change the result. The weights are the EMA.

    Which t and block suit a task is what `jdm probe` measures (Xiang et al. 2023).

    Raises InvalidValue, naming the argument, for images of another shape, dtype or range, a t
    outside [0, T) and an unknown block.
    """
    joint = as_joint(joint)
    images = check_images(joint, images)
    known, steps = widths(joint.model), joint.diffusion.steps
    chosen = (blocks,) if isinstance(blocks, str) else tuple(known if blocks is None else blocks)
    for name in chosen:
        check_name("blocks", name, known)
    if not isinstance(t, int | np.integer) or not 0 <= t < steps:
        raise InvalidValue("t", t, f"must be a whole number in [0, {steps})")
    Option(256, "", POSITIVE).check("batch_size", batch_size)
    static = (joint.model, joint.diffusion, chosen)
    seeds = np.arange(seed, seed + len(images), dtype=np.uint32)

    def of_batch(weights: Any, batch: Any, seeds: Any) -> Any:
        return _features(*static, weights, to_floats(batch), jnp.int32(t), seeds)

    found = in_batches(of_batch, joint.weights, [images, seeds], min(batch_size, len(images)))
    columns = tuple(name for name in chosen for _ in range(known[name]))
    return BlockFeatures(found, columns)
