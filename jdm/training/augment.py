"""Augmentation of the classifier's images, inside the training step.

An operation is a function of an image [H, W, C] and of uniform random numbers in [0, 1). `augment`
draws these numbers from a key for each image and vmaps the operation over the batch, so row i
depends on its image, the key and i only, whatever the size of the batch. MixUp is the exception: it
mixes pairs of images of a batch. Lengths are shares of the image's side, for images of any size.

(15)  MixUp        x = (1 - s) x_i + s x_j,  L = (1 - s) CE(y_i) + s CE(y_j)   Zhang et al. 2018
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jdm import names
from jdm.arrays import Images

Image = Float[Array, "h w c"]
Scalar = Float[Array, ""] | float
Shares = Float[Array, " b"]  # in [0, 1), of a row's partner in the mixed image

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and kornia weigh red, green and blue


def sample_at(image: Image, y: Array, x: Array, fill: float | None) -> Image:
    """The image at y, x [H, W], bilinear. fill: the value outside; None repeats the edge pixels."""
    mode = dict(mode="nearest") if fill is None else dict(mode="constant", cval=fill)
    sample: Callable = partial(jax.scipy.ndimage.map_coordinates, order=1, **mode)
    return jax.vmap(sample, in_axes=(-1, None), out_axes=-1)(image, [y, x])


def affine(
    image: Image, degrees: Scalar, fill: float | None, scale: Scalar = 1.0, shift: tuple = (0, 0)
) -> Image:
    """The image rotated counter-clockwise about its centre, enlarged by `scale`, then shifted.

    shift: down and to the right, as shares of the side. fill: see `sample_at`.
    """
    (height, width, _), (down, right) = image.shape, shift
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, x = y - middle_y - down * height, x - middle_x - right * width
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    return sample_at(image, middle_y + sin * x + cos * y, middle_x + cos * x - sin * y, fill)


def resized_crop(image: Image, top: Scalar, left: Scalar, height: Scalar, width: Scalar) -> Image:
    """A box of the image, resized bilinearly to its size; corner pixels stay in the corners."""
    rows, columns, _ = image.shape
    y = top + jnp.linspace(0, 1, rows) * (height - 1)
    x = left + jnp.linspace(0, 1, columns) * (width - 1)
    y, x = jnp.meshgrid(y, x, indexing="ij")
    return sample_at(image, y, x, fill=None)


def random_resized_crop(image: Image, u: Float[Array, "22"], area: tuple[float, float]) -> Image:
    """A random box, resized to the size of the image.

    area: the range of the box's share of the image. Its aspect ratio is between 3:4 and 4:3. As in
    kornia, it is the first of ten random boxes that is smaller than the image along both sides.
    """
    rows, columns, _ = image.shape
    pixels = rows * columns * (area[0] + (area[1] - area[0]) * u[:10])
    aspect = (4 / 3) ** (2 * u[10:20] - 1)
    # If none fits, the eleventh box is taken.
    heights = jnp.append(jnp.round(jnp.sqrt(pixels / aspect)), round(0.75 * rows))
    widths = jnp.append(jnp.round(jnp.sqrt(pixels * aspect)), columns)
    fits = ((heights < rows) & (widths < columns)).at[-1].set(True)
    height, width = heights[fits.argmax()], widths[fits.argmax()]
    top, left = jnp.floor(u[20] * (rows - height + 1)), jnp.floor(u[21] * (columns - width + 1))
    return resized_crop(image, top, left, height, width)


def random_affine(
    image: Image, u: Float[Array, "4"], degrees: float, scale: float, shift: float
) -> Image:
    """Rotated by up to ±degrees, scaled by 1 ± scale, shifted by up to ±shift of the side."""
    angle, size, down, right = 2 * u - 1
    # Edge pixels are repeated: the background of digits may have any grey.
    return affine(image, degrees * angle, None, 1 + scale * size, (shift * down, shift * right))


def padded_crop(image: Image, u: Float[Array, "2"], share: float) -> Image:
    """Shifted by whole pixels, up to ±share of the side, and mirrored beyond the edge."""
    pad = max(1, round(share * image.shape[0]))
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    top, left = jnp.floor(u * (2 * pad + 1)).astype(jnp.int32)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip(image: Image, u: Float[Array, "0"]) -> Image:
    """The image mirrored left to right."""
    return image[:, ::-1]


# These operations are for images in [0, 1], and clip the result to [0, 1] unless stated otherwise.


def grey(image: Image) -> Float[Array, "h w 1"]:
    """The luminance of an RGB image, or the grey image itself."""
    return image if image.shape[-1] == 1 else (image * jnp.asarray(LUMA)).sum(-1, keepdims=True)


def multiply(image: Image, factor: Scalar) -> Image:
    """Brightness of PIL and torchvision, and contrast of kornia: multiplies by the factor."""
    return jnp.clip(image * factor, 0, 1)


def add(image: Image, factor: Scalar) -> Image:
    """Brightness of kornia: adds factor - 1."""
    return jnp.clip(image + (factor - 1), 0, 1)


def contrast(image: Image, factor: Scalar) -> Image:
    """Contrast of PIL and torchvision: scales differences from the mean luminance of the image."""
    mean = grey(image).mean()
    return jnp.clip(mean + factor * (image - mean), 0, 1)


def saturation(image: Image, factor: Scalar) -> Image:
    """Saturation of PIL and torchvision: scales differences from the luminance of each pixel."""
    own = grey(image)
    return jnp.clip(own + factor * (image - own), 0, 1)


def hue(image: Image, turns: Scalar) -> Image:
    """Hue shifted by `turns` of the colour circle. RGB values may have any range: not clipped."""
    low, high = image.min(axis=-1), image.max(axis=-1)
    (red, green, blue), span = jnp.moveaxis(image, -1, 0), jnp.where(high > low, high - low, 1)
    # The hue of HSV, in sixths of a turn. Red is at 0, green at 2, blue at 4.
    angle = jnp.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span)
    angle = jnp.where(high == red, (green - blue) / span, angle) + 6 * turns
    distance = jnp.abs((angle[..., None] - jnp.asarray([0, 2, 4]) + 3) % 6 - 3)
    return low[..., None] + (high - low)[..., None] * jnp.clip(2 - distance, 0, 1)


def sharpness(image: Image, factor: Scalar) -> Image:
    """Sharpness of PIL: scales differences from a smoothed image, whose border is not smoothed.

    As in kornia, the smoothed image is clipped, but the result only for factors over 1.
    """
    shifts = itertools.product((-1, 0, 1), repeat=2)
    around = sum(jnp.roll(image, shift, (0, 1)) for shift in shifts)
    smooth = jnp.clip((around + 4 * image) / 13, 0, 1)
    smooth = image.at[1:-1, 1:-1].set(smooth[1:-1, 1:-1])
    out = smooth + factor * (image - smooth)
    return jnp.where(factor > 1, jnp.clip(out, 0, 1), out)


def jitter(image: Image, u: Float[Array, "8"], strengths: tuple[float, ...]) -> Image:
    """Changes brightness, contrast, saturation and hue of an RGB image, in random order.

    strengths: s_1 to s_4. The first three factors are in 1 ± s, the turn of the hue is in ± s_4.
    """
    amounts = jnp.asarray([1.0, 1.0, 1.0, 0.0]) + jnp.asarray(strengths) * (2 * u[:4] - 1)

    def change(image, which):
        changes = (multiply, contrast, saturation, hue)
        return jax.lax.switch(which, changes, image, amounts[which]), None

    return jax.lax.scan(change, image, u[4:].argsort())[0]


class Operation(NamedTuple):
    """An operation of a policy, and how many random numbers it takes from `augment`."""

    probability: float  # that an image gets it
    apply: Callable[[Image, Float[Array, " draws"]], Image]
    draws: int = 1
    colour: bool = False  # if true, only RGB images get it


class MixUp(NamedTuple):
    """How images are mixed in pairs (15)."""

    batch: float  # the probability that a batch has mixed images
    image: float  # the probability that an image of such a batch is mixed
    labels: bool  # whether the loss uses both labels of a mixed image


class Policy(NamedTuple):
    """Operations, in this order, then MixUp. noised: whether noised images may be augmented."""

    operations: tuple[Operation, ...]
    mixup: MixUp | None = None
    noised: bool = False

    @property
    def augments(self) -> bool:
        """Whether it changes images at all."""
        return bool(self.operations) or self.mixup is not None

    @property
    def flips(self) -> bool:
        """Whether it mirrors images."""
        return any(operation.apply is flip for operation in self.operations)


def between(low: float, high: float, operation: Callable[[Image, Scalar], Image]) -> Callable:
    """The operation with a factor drawn uniformly from [low, high)."""
    return lambda image, u: operation(image, low + (high - low) * u[0])


def in_unit_range(operation: Callable) -> Callable:
    """The operation, which expects images in [0, 1], for images in [-1, 1]."""
    return lambda image, u: 2 * operation((image + 1) / 2, u) - 1


def deja(pixels: Callable, corner: float, contrast: Callable, brightness: Callable) -> tuple:
    """The operations of Deja et al. 2023, as published or repaired.

    pixels: makes an operation on images in [-1, 1] of one on images in [0, 1]. corner: the value of
    the corners after a rotation.
    """
    jitter_all = partial(jitter, strengths=(0.1, 0.1, 0.1, 0.1))
    return (
        Operation(0.25, pixels(jitter_all), draws=8, colour=True),
        Operation(0.25, partial(random_resized_crop, area=(0.5, 1.0)), draws=22),
        Operation(0.25, between(-30.0, 30.0, partial(affine, fill=corner))),
        Operation(0.5, flip, draws=0),
        Operation(0.25, pixels(between(0.6, 1.8, contrast))),
        Operation(0.25, pixels(between(0.4, 2.0, sharpness))),
        Operation(0.25, pixels(between(0.6, 1.8, brightness))),
    )


_mild_jitter = partial(jitter, strengths=(0.2, 0.2, 0.2, 0.02))
_small_affine = partial(random_affine, degrees=10.0, scale=0.1, shift=1 / 16)

# By config.loss.augment.
POLICIES: dict[str, Policy] = names.POLICIES.records(
    {
        "none": Policy(()),
        # With the results of kornia 0.6, for comparison. It applies operations for [0, 1] to images
        # in [-1, 1], and has other faults; docs/augment.md lists them.
        "published": Policy(
            deja(lambda operation: operation, 0.0, multiply, add),
            MixUp(batch=0.5, image=0.5, labels=False),
            noised=True,
        ),
        # Without these faults. Both mirror images.
        "repaired": Policy(
            deja(in_unit_range, -1.0, contrast, multiply), MixUp(batch=1.0, image=0.5, labels=True)
        ),
        # For digits: the changes are too small to make another digit.
        "digits": Policy((Operation(0.75, _small_affine, draws=4),)),
        # For photographs.
        "natural": Policy(
            (
                Operation(0.5, flip, draws=0),
                Operation(1.0, partial(padded_crop, share=1 / 8), draws=2),
                Operation(0.5, in_unit_range(_mild_jitter), draws=8, colour=True),
            )
        ),
    }
)


def partners(rows: Array) -> Array:
    """For each row of a batch the row that is mixed into it: the next one, into the last the first.

    Batches are in random order, so the next image is as random as a drawn one (Zhang et al. 2018
    draw a permutation); and where a batch is split over devices, each sends one row to another.
    """
    return jnp.roll(rows, -1, axis=0)


@partial(jax.jit, static_argnames="policy")
def augment(policy: Policy, key: Key[Array, ""], images: Images) -> tuple[Images, Shares | None]:
    """(augmented images in [-1, 1], the shares of their partners if mixed images have two labels,
    else None)."""
    image_key, batch_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(image_key, jnp.arange(len(images)))
    # One draw for all numbers of an image: each draw takes about a second to compile.
    count = sum(1 + operation.draws for operation in policy.operations) + 2
    u = jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)

    for probability, apply, draws, colour in policy.operations:
        coin, numbers, u = u[:, 0], u[:, 1 : 1 + draws], u[:, 1 + draws :]
        if images.shape[-1] == 3 or not colour:
            applied = (coin < probability)[:, None, None, None]
            images = jnp.where(applied, jax.vmap(apply)(images, numbers), images)
    if policy.mixup is None:
        return images, None
    images, shares = mix(policy.mixup, batch_key, images, u)
    return images, shares if policy.mixup.labels else None


def mix(
    settings: MixUp, key: Key[Array, ""], images: Images, u: Float[Array, "b 2"]
) -> tuple[Images, Shares]:
    """(mixed images, the shares of their partners) (15).

    key: decides whether the batch is mixed. u: random numbers in [0, 1) that decide whether a row
    is mixed, and the share of its partner.
    """
    batch = jax.random.uniform(key, (), jnp.float32) < settings.batch
    shares = jnp.where(batch & (u[:, 0] < settings.image), u[:, 1], 0)
    share = shares[:, None, None, None]
    return (1 - share) * images + share * partners(images), shares
