"""Augmentation of what the classifier sees, inside the training step.

Owns the operations, and the named policies made of them. Knows no model and no loss. The diffusion
term never sees an augmented image.

An operation is a function of an image [H, W, C] and as many numbers, drawn evenly from [0, 1), as
it asks for. `augment` vmaps each over the batch, with the numbers drawn from a key for every image,
so that row i depends on its image and its key alone, whatever the size of the batch. MixUp alone
looks at the batch: it pairs its images. Sizes are shares of the side, so that 8×8 works as 32×32
does. Grey images are spared what is done to colour.

(15)  mixup        x = (1 - s) x_i + s x_j,  L = (1 - s) CE(y_i) + s CE(y_j)   Zhang et al. 2018
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Image = Float[Array, "h w c"]
Images = Float[Array, "b h w c"]
Scalar = Float[Array, ""] | float

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and kornia weigh red, green and blue


# Where pixels come from --------------------------------------------------------------------------


def sample_at(image: Image, y: Array, x: Array, fill: float | None) -> Image:
    """The image at fractional rows y and columns x [H, W], bilinear.

    fill: what lies outside, blended in beyond the last pixel; None continues the edge.
    """
    # Not dm_pix.affine_transform: it multiplies the coordinates as matrices, which accelerators
    # round, and to it a border pixel that is off by a rounding error is outside.
    mode = dict(mode="nearest") if fill is None else dict(mode="constant", cval=fill)
    at = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=1, **mode)
    return jax.vmap(at, in_axes=-1, out_axes=-1)(image)


def affine(
    image: Image, degrees: Scalar, scale: Scalar, down: Scalar, right: Scalar, fill: float | None
) -> Image:
    """Rotated counter-clockwise about the centre, enlarged by scale, then moved.

    down, right: shares of the side. fill: see `sample_at`.
    """
    height, width, _ = image.shape
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, x = y - middle_y - down * height, x - middle_x - right * width
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    return sample_at(image, middle_y + sin * x + cos * y, middle_x + cos * x - sin * y, fill)


def rotate(image: Image, degrees: Scalar, fill: float | None) -> Image:
    """Rotated counter-clockwise about the centre. fill: of the corners."""
    return affine(image, degrees, 1.0, 0.0, 0.0, fill)


def resized_crop(image: Image, top: Scalar, left: Scalar, height: Scalar, width: Scalar) -> Image:
    """A box of whole pixels, bilinearly brought back to the size of the image, corner to corner."""
    rows, columns, _ = image.shape
    y = top + jnp.linspace(0, 1, rows) * (height - 1)
    x = left + jnp.linspace(0, 1, columns) * (width - 1)
    return sample_at(image, *jnp.meshgrid(y, x, indexing="ij"), fill=None)


def random_resized_crop(image: Image, u: Float[Array, "22"], area: tuple[float, float]) -> Image:
    """A box of a share of the area and of an aspect from 3:4 to 4:3, anywhere in the image.

    As kornia draws it: ten attempts, the first that is smaller than the image both ways.
    """
    rows, columns, _ = image.shape
    pixels = rows * columns * (area[0] + (area[1] - area[0]) * u[:10])
    aspect = (4 / 3) ** (2 * u[10:20] - 1)
    # Should none fit: three quarters of the image.
    heights = jnp.append(jnp.round(jnp.sqrt(pixels / aspect)), round(0.75 * rows))
    widths = jnp.append(jnp.round(jnp.sqrt(pixels * aspect)), columns)
    fits = ((heights < rows) & (widths < columns)).at[-1].set(True)
    height, width = heights[fits.argmax()], widths[fits.argmax()]
    top, left = jnp.floor(u[20] * (rows - height + 1)), jnp.floor(u[21] * (columns - width + 1))
    return resized_crop(image, top, left, height, width)


def random_affine(
    image: Image, u: Float[Array, "4"], degrees: float, scale: float, shift: float
) -> Image:
    """Rotated by up to ±degrees, scaled by 1 ± scale, moved by up to ±shift of the side."""
    angle, size, down, right = 2 * u - 1
    # The edge goes on: the background of digits may be of any grey.
    return affine(image, degrees * angle, 1 + scale * size, shift * down, shift * right, fill=None)


def padded_crop(image: Image, u: Float[Array, "2"], share: float) -> Image:
    """Moved by whole pixels, up to a share of the side each way; mirrored beyond the edge."""
    pad = max(1, round(share * image.shape[0]))
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    top, left = jnp.floor(u * (2 * pad + 1)).astype(jnp.int32)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip(image: Image, u: Float[Array, "0"]) -> Image:
    """Left becomes right."""
    return dm_pix.flip_left_right(image)


# What pixels become: made for images in [0, 1], and clamping to it -------------------------------


def grey(image: Image) -> Float[Array, "h w 1"]:
    """The luminance of an RGB image, or the grey image itself."""
    return image if image.shape[-1] == 1 else (image * jnp.asarray(LUMA)).sum(-1, keepdims=True)


def multiply(image: Image, factor: Scalar) -> Image:
    """Brightness as PIL and torchvision have it; what kornia calls contrast."""
    return jnp.clip(image * factor, 0, 1)


def add(image: Image, factor: Scalar) -> Image:
    """What kornia calls brightness: adds factor - 1."""
    return jnp.clip(dm_pix.adjust_brightness(image, factor - 1), 0, 1)


def contrast(image: Image, factor: Scalar) -> Image:
    """Away from the mean grey of the image, which stays, as in PIL and torchvision."""
    # Not dm_pix.adjust_contrast: it keeps the mean of each channel.
    mean = grey(image).mean()
    return jnp.clip(mean + factor * (image - mean), 0, 1)


def saturation(image: Image, factor: Scalar) -> Image:
    """Away from the grey of each pixel, as in PIL and torchvision."""
    # Not dm_pix.adjust_saturation: it multiplies the S of HSV.
    mean = grey(image)
    return jnp.clip(mean + factor * (image - mean), 0, 1)


def hue(image: Image, turns: Scalar) -> Image:
    """The colour circle turned; 1 is all the way round. Takes any range, and clamps nothing."""
    # What all channels have in common does not turn, and dm_pix wants positive channels.
    least = image.min()
    return least + dm_pix.adjust_hue(image - least, turns)


def sharpness(image: Image, factor: Scalar) -> Image:
    """Away from a smoothed image, as PIL has it: the outermost pixels are not smoothed.

    As in kornia, the smoothed image is clamped always, and the outcome for factors over 1.
    """
    around = sum(
        jnp.roll(image, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)
    )
    smooth = jnp.clip((around + 4 * image) / 13, 0, 1)
    smooth = image.at[1:-1, 1:-1].set(smooth[1:-1, 1:-1])
    out = smooth + factor * (image - smooth)
    return jnp.where(factor > 1, jnp.clip(out, 0, 1), out)


def jitter(image: Image, u: Float[Array, "8"], strengths: tuple[float, ...]) -> Image:
    """Brightness, contrast, saturation and hue of an RGB image, in any order.

    strengths: of the four; factors are drawn from 1 ± the first three, turns from ± the last.
    """
    amounts = jnp.asarray([1.0, 1.0, 1.0, 0.0]) + jnp.asarray(strengths) * (2 * u[:4] - 1)

    def step(image, which):
        change = (multiply, contrast, saturation, hue)
        return jax.lax.switch(which, change, image, amounts[which]), None

    return jax.lax.scan(step, image, u[4:].argsort())[0]


# Policies ----------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """apply: (image, numbers [draws]) -> image. probability: that an image gets it.

    colour: it needs RGB, and passes grey images by.
    """

    probability: float
    apply: Callable[[Image, Float[Array, " draws"]], Image]
    draws: int = 1
    colour: bool = False


class MixUp(NamedTuple):
    """Probabilities that a batch is mixed at all, and that an image of such a batch is (15).

    labels: whether the loss mixes them too.
    """

    batch: float
    image: float
    labels: bool


@dataclasses.dataclass(frozen=True)
class Policy:
    """Operations in their order, then MixUp. noised: may be given noised images too."""

    operations: tuple[Operation, ...]
    mixup: MixUp | None = None
    noised: bool = False

    @property
    def flips(self) -> bool:
        """Whether it mirrors images."""
        return any(operation.apply is flip for operation in self.operations)


def between(low: float, high: float, operation: Callable[[Image, Scalar], Image]) -> Callable:
    """The operation with a factor drawn evenly from [low, high)."""
    return lambda image, u: operation(image, low + (high - low) * u[0])


def in_unit_range(operation: Callable) -> Callable:
    """An operation that is made for [0, 1], for images in [-1, 1]."""
    return lambda image, u: 2 * operation((image + 1) / 2, u) - 1


_crop = Operation(0.25, functools.partial(random_resized_crop, area=(0.5, 1.0)), draws=22)
_flip = Operation(0.5, flip, draws=0)
_jitter = functools.partial(jitter, strengths=(0.1, 0.1, 0.1, 0.1))
_mild_jitter = functools.partial(jitter, strengths=(0.2, 0.2, 0.2, 0.02))
_wiggle = functools.partial(random_affine, degrees=10.0, scale=0.1, shift=1 / 16)

POLICIES: dict[str, Policy] = {
    "none": Policy((), noised=True),
    # Deja et al. 2023's, with what kornia 0.6 makes of it. Faults, kept for comparison:
    # - What changes pixels is made for [0, 1] and is given [-1, 1]. Jitter, contrast and brightness
    #   clamp all that is darker than the middle to the middle; so does sharpness, over 1.
    # - kornia's contrast multiplies and its brightness adds; neither turns about the mean.
    # - Rotation fills the corners with 0, a middle grey.
    # - Digits are mirrored too.
    # - MixUp mixes the images and leaves the labels. It tosses a coin for the batch and one for
    #   each image, so that a quarter of the images is mixed, not half.
    # - A classifier of noised images gets them augmented after the noise was added.
    # Not kept: kornia draws the coin of the crop and the order of the jitter once for a batch; here
    # each image has its own, with the same probability.
    "published": Policy(
        (
            Operation(0.25, _jitter, draws=8, colour=True),
            _crop,
            Operation(0.25, between(-30.0, 30.0, functools.partial(rotate, fill=0.0))),
            _flip,
            Operation(0.25, between(0.6, 1.8, multiply)),
            Operation(0.25, between(0.4, 2.0, sharpness)),
            Operation(0.25, between(0.6, 1.8, add)),
        ),
        MixUp(batch=0.5, image=0.5, labels=False),
        noised=True,
    ),
    # The same, with what changes pixels in its range and as PIL has it (a factor of 1 changes
    # nothing, one of 0 leaves black, grey or a blur), black corners, and MixUp of half of the
    # images and of their labels. It still mirrors.
    "repaired": Policy(
        (
            Operation(0.25, in_unit_range(_jitter), draws=8, colour=True),
            _crop,
            Operation(0.25, between(-30.0, 30.0, functools.partial(rotate, fill=-1.0))),
            _flip,
            Operation(0.25, in_unit_range(between(0.6, 1.8, contrast))),
            Operation(0.25, in_unit_range(between(0.4, 2.0, sharpness))),
            Operation(0.25, in_unit_range(between(0.6, 1.8, multiply))),
        ),
        MixUp(batch=1.0, image=0.5, labels=True),
    ),
    # What leaves a digit the digit it is.
    "digits": Policy((Operation(0.75, _wiggle, draws=4),)),
    # What leaves a photograph one of the same thing.
    "natural": Policy(
        (
            _flip,
            Operation(1.0, functools.partial(padded_crop, share=1 / 8), draws=2),
            Operation(0.5, in_unit_range(_mild_jitter), draws=8, colour=True),
        )
    ),
}


class Pairs(NamedTuple):
    """Whose label counts too, rows of the batch, and for what share of the whole, in [0, 1]."""

    partner: Int[Array, " b"]
    share: Float[Array, " b"]


@functools.partial(jax.jit, static_argnames="policy")
def augment(policy: Policy, key: Key[Array, ""], images: Images) -> tuple[Images, Pairs | None]:
    """(images augmented under the policy, the pairs whose labels are to be mixed, or None).

    images: floats in [-1, 1], and so is what comes back. Row i depends on images[i], the key and i
    alone, but for MixUp.
    """
    image_key, batch_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(image_key, jnp.arange(len(images)))
    # All numbers of an image at once: each draw of its own would take a second to compile.
    count = sum(1 + operation.draws for operation in policy.operations) + 2
    u = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)

    for probability, apply, draws, colour in policy.operations:
        coin, mine, u = u[:, 0], u[:, 1 : 1 + draws], u[:, 1 + draws :]
        if images.shape[-1] == 3 or not colour:
            heads = (coin < probability)[:, None, None, None]
            images = jnp.where(heads, jax.vmap(apply)(images, mine), images)
    if policy.mixup is None:
        return images, None
    images, pairs = mix(policy.mixup, batch_key, images, u)
    return images, pairs if policy.mixup.labels else None


def mix(
    settings: MixUp, key: Key[Array, ""], images: Images, u: Float[Array, "b 2"]
) -> tuple[Images, Pairs]:
    """(images, each with its share of another one of the batch, the pairs) (15).

    The partner of a row is drawn for the batch, whether and how much it is mixed for the row.
    """
    numbers = jax.random.uniform(key, (len(images) + 1,))
    mixed = (numbers[0] < settings.batch) & (u[:, 0] < settings.image)
    pairs = Pairs(numbers[1:].argsort(), jnp.where(mixed, u[:, 1], 0))
    share = pairs.share[:, None, None, None]
    return (1 - share) * images + share * images[pairs.partner], pairs
