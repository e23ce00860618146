"""jdm.training.augment: each operation against something else that does it, then the policies.

kornia.npz holds what kornia 0.6.12, of the months of the published code, makes of one image:
RandomContrast ("multiply"), RandomBrightness ("add"), RandomSharpness, RandomRotation,
RandomResizedCrop ("crop", with the box it drew) and the steps of its ColorJitter, each with the
factor in its name.
"""

import colorsys
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from jdm.training import augment as aug
from jdm.training.augment import POLICIES, MixUp, Operation, Policy, augment

KORNIA = {
    name: jnp.asarray(array)
    for name, array in np.load(Path(__file__).with_name("kornia.npz")).items()
}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, size=(8, 9, 3), dtype=np.uint8)
UNIT = jnp.asarray(PIXELS / 255, jnp.float32)  # in [0, 1]
IMAGE = 2 * UNIT - 1
# A function compiled whole is compiled faster than its operations one by one.
ADJUST = {
    name: jax.jit(getattr(aug, name))
    for name in ("multiply", "add", "contrast", "saturation", "hue", "sharpness")
}
affine = jax.jit(aug.affine, static_argnames="fill")
resized_crop = jax.jit(aug.resized_crop)
SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]
KEY = jax.random.key(0)
ROWS = 64


def close(ours, other, atol=1e-5):
    np.testing.assert_allclose(ours, other, atol=atol)


# What pixels become.


@pytest.mark.parametrize("name", [name for name in KORNIA if " " in name])
def test_operations_are_those_of_kornia_on_images_in_minus_one_to_one(name):
    operation, amount = name.split()
    if operation == "rotate":
        ours = affine(KORNIA["image"], float(amount), fill=0.0)
    else:
        amount = float(amount) - (operation == "hue")
        ours = ADJUST[operation](KORNIA["image"], amount)
    close(ours, KORNIA[name], atol=3e-6)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.8])
@pytest.mark.parametrize(
    "operation, enhance, levels",
    [
        ("multiply", ImageEnhance.Brightness, 1.01),
        ("contrast", ImageEnhance.Contrast, 2),  # PIL rounds the mean as well
        ("saturation", ImageEnhance.Color, 2),  # and the grey
        ("sharpness", ImageEnhance.Sharpness, 2),  # and the blur
    ],
)
def test_operations_are_those_of_pil_on_images_in_zero_to_one(operation, enhance, levels, factor):
    theirs = np.asarray(enhance(Image.fromarray(PIXELS)).enhance(factor), np.float64)
    close(255 * ADJUST[operation](UNIT, factor), theirs, atol=levels)


@pytest.mark.parametrize("turns", [-0.4, 0.0, 0.1, 1.0])
def test_hue_is_turned_and_nothing_else_is(turns):
    def turned(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + turns) % 1, s, v)

    close(ADJUST["hue"](UNIT, turns), np.apply_along_axis(turned, -1, np.asarray(UNIT, np.float64)))
    close(ADJUST["hue"](IMAGE, turns), 2 * ADJUST["hue"](UNIT, turns) - 1)  # in any range


def test_kornias_brightness_adds():
    close(ADJUST["add"](UNIT, 1.3), np.clip(UNIT + 0.3, 0, 1))
    close(ADJUST["add"](UNIT, 1.0), UNIT)


def test_contrast_keeps_the_mean_and_widens_the_rest():
    grey = 0.4 + 0.2 * jnp.asarray(RNG.random((8, 8, 1)), jnp.float32)
    wide = ADJUST["contrast"](grey, 1.8)
    close(wide.mean(), grey.mean())
    close(wide.std(), 1.8 * grey.std())


def test_the_outermost_pixels_are_not_smoothed_and_a_flat_image_stays():
    smooth = np.asarray(ADJUST["sharpness"](UNIT, 0.0))
    inner = np.zeros((8, 9, 3), bool)
    inner[1:-1, 1:-1] = True
    np.testing.assert_array_equal(smooth[~inner], np.asarray(UNIT)[~inner])
    assert np.abs(smooth - UNIT)[inner].mean() > 0.05
    close(ADJUST["sharpness"](jnp.full((8, 8, 1), 0.3), 2.0), 0.3)


def test_jitter_is_its_four_steps_in_the_order_drawn():
    steps = [ADJUST[name] for name in ("multiply", "contrast", "saturation", "hue")]
    jitter = jax.jit(functools.partial(aug.jitter, strengths=(0.4, 0.5, 0.6, 0.2)))
    draws = jnp.asarray([0.9, 0.1, 0.8, 0.7])
    amounts = [1 + 0.4 * 0.8, 1 - 0.5 * 0.8, 1 + 0.6 * 0.6, 0.2 * 0.4]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 0, 1]):
        u = jnp.concatenate([draws, jnp.argsort(jnp.asarray(order)) / 4])
        expected = UNIT
        for which in order:
            expected = steps[which](expected, amounts[which])
        close(jitter(UNIT, u), expected)
    close(jitter(UNIT, u.at[:4].set(0.5)), UNIT)


# Where pixels come from.


def test_rotation_is_about_the_centre_and_counter_clockwise():
    square = IMAGE[:, :8]
    close(affine(square, 0.0, fill=0.0), square)
    close(affine(square, 90.0, fill=0.0), np.rot90(square))
    close(affine(square, -180.0, fill=0.0), square[::-1, ::-1])


def moved(image, degrees, scale, shift, **mode):
    """scipy's, channel by channel: it asks where each pixel of the outcome comes from."""
    angle, size = np.deg2rad(degrees), np.array(image.shape[:2])
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    offset = (size - 1) / 2 - matrix @ ((size - 1) / 2 + shift * size)
    planes = [
        ndimage.affine_transform(image[..., c], matrix, offset, order=1, **mode) for c in range(3)
    ]
    return np.stack(planes, axis=-1)


# Degrees, scale, shift: the last by whole pixels, down and to the right.
MAPS = [(30.0, 1.0, (0.0, 0.0)), (-13.0, 0.8, (0.1, -0.2)), (0.0, 1.0, (0.25, 1 / 3))]


@pytest.mark.parametrize("fill, mode", [(-1.0, "grid-constant"), (None, "nearest")])
def test_affine_maps_are_those_of_scipy(fill, mode):
    given = np.asarray(IMAGE, np.float64)
    for degrees, scale, shift in MAPS:
        ours = affine(IMAGE, degrees, fill, scale, shift)
        close(ours, moved(given, degrees, scale, np.array(shift), mode=mode, cval=-1.0))
    close(ours[2:, 3:], IMAGE[:-2, :-3])


def test_a_crop_of_the_whole_image_is_the_image():
    close(resized_crop(IMAGE, 0.0, 0.0, 8.0, 9.0), IMAGE)


def test_a_crop_is_zoomed_in_corner_to_corner():
    ours = resized_crop(IMAGE, 2.0, 3.0, 4.0, 6.0)
    close(ours, ndimage.zoom(np.asarray(IMAGE[2:6, 3:], np.float64), (2, 1.5, 1), order=1))
    close(resized_crop(KORNIA["image"], *KORNIA["box"]), KORNIA["crop"])


def ramps(size: int):
    """An image whose channels say which row and column a pixel is from."""
    return jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), -1) * 1.0


def test_random_crops_are_boxes_of_half_to_all_of_the_area_anywhere():
    u = jnp.asarray(RNG.random((400, 22)), jnp.float32)
    u = u.at[-1].set(0.5).at[-1, :10].set(0.9999)  # the last: all of the area, square
    crop = functools.partial(aug.random_resized_crop, area=(0.5, 1.0))
    *crops, last = np.asarray(jax.jit(jax.vmap(crop, (None, 0)))(ramps(32), u))
    crops = np.stack(crops)
    close(crops[:, [0, -1]][:, :, [0, -1]], crops[:, [0, -1]][:, :, [0, -1]].round(), atol=1e-4)
    low, high = crops.min(axis=(1, 2)).round(), crops.max(axis=(1, 2)).round()
    sides = high - low + 1  # [400, 2]
    assert low.min() == 0 and high.max() == 31 and sides.max() == 31
    area, aspect = sides.prod(axis=1) / 32**2, sides[:, 0] / sides[:, 1]
    assert 0.47 < area.min() < 0.53 and area.max() > 0.85
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.42
    assert abs(np.log(aspect).mean()) < 0.03 and abs((low + high).mean() - 31) < 0.5
    # None of its ten attempts was smaller than the image: three quarters of it.
    close(last.min(axis=(0, 1)), [4, 0])
    close(last.max(axis=(0, 1)), [27, 31])


def test_padded_crops_move_by_whole_pixels_and_mirror_the_edge():
    padded = np.pad(IMAGE, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    for top, left in [(0, 0), (1, 1), (2, 0), (1, 2)]:
        u = (jnp.asarray([top, left]) + 0.99) / 3
        ours = aug.padded_crop(IMAGE, u, share=1 / 8)
        np.testing.assert_array_equal(ours, padded[top : top + 8, left : left + 9])


def test_a_flip_mirrors_and_two_do_nothing():
    once = aug.flip(IMAGE, jnp.zeros(0))
    np.testing.assert_array_equal(once, np.asarray(IMAGE)[:, ::-1])
    np.testing.assert_array_equal(aug.flip(once, jnp.zeros(0)), IMAGE)


@pytest.mark.parametrize("size", [8, 28])
def test_the_policy_for_digits_moves_no_pixel_far_and_mirrors_nothing(size):
    (operation,) = POLICIES["digits"].operations
    ends = list(itertools.product([0.0, 1.0], repeat=4))
    u = jnp.asarray([*ends, [0.5] * 4])
    *where, still = np.asarray(jax.jit(jax.vmap(operation.apply, (None, 0)))(ramps(size), u))
    close(still, ramps(size), atol=1e-4)
    where = np.stack(where)
    distance = np.linalg.norm(where - ramps(size), axis=-1)
    assert 0.1 * size < distance.max() < 0.25 * size
    assert np.diff(where[..., 0], axis=1).min() > -1e-3
    assert np.diff(where[..., 1], axis=2).min() > -1e-3


# How operations are put together.


def adds(amount: float) -> Operation:
    """Adds its amount to half of the images."""
    return Operation(0.5, lambda image, u: image + amount, draws=0)


def test_each_operation_has_its_own_coin_for_each_image():
    policy = Policy((adds(1.0)._replace(probability=0.25), adds(2.0), adds(4.0)))
    images, pairs = augment(policy, KEY, jnp.zeros((8000, 1, 1, 1)))
    assert pairs is None
    counts = np.bincount(np.asarray(images).ravel().astype(int), minlength=8)
    quarter = np.array([0.75, 0.25])
    expected = np.tile(quarter, 4) / 4 * 8000
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_factors_are_even_over_their_range_and_drawn_for_each_image():
    add = Operation(1.0, aug.between(-2.0, 6.0, lambda image, factor: image + factor))
    alone, both = (augment(Policy((add,) * n), KEY, jnp.zeros((4000, 1, 1, 1)))[0] for n in (1, 2))
    first, second = np.ravel(alone), np.ravel(both - alone)
    for factors in (first, second):
        assert -2 <= factors.min() < -1.9 and 5.9 < factors.max() < 6
        assert abs(factors.mean() - 2) < 0.2 and abs(factors.std() - 8 / np.sqrt(12)) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08


def test_colour_is_for_rgb_alone():
    policy = Policy((Operation(1.0, lambda image, u: image + 1, colour=True), adds(2.0)))
    grey, rgb = (augment(policy, KEY, jnp.zeros((40, 1, 1, c)))[0] for c in (1, 3))
    assert set(np.unique(grey)) == {0, 2}
    np.testing.assert_array_equal(rgb[..., :1], grey + 1)  # and draws nothing from the others


def test_mixup_takes_a_share_of_a_partner():
    images = jnp.asarray(RNG.normal(size=(50, 2, 2, 1)), jnp.float32)
    mixed, shares = augment(Policy((), MixUp(1.0, 0.5, labels=True)), KEY, images)
    share = np.asarray(shares)[:, None, None, None]
    partner = [*range(1, 50), 0]
    np.testing.assert_array_equal(aug.partners(jnp.arange(50)), partner)
    close(mixed, (1 - share) * images + share * images[np.array(partner)], atol=1e-6)
    untouched = np.asarray(shares) == 0
    assert 10 < untouched.sum() < 40
    np.testing.assert_array_equal(mixed[untouched], images[untouched])
    assert 0.3 < share[~untouched].mean() < 0.7 and share.max() < 1


def test_mixup_is_as_likely_as_the_policies_say():
    """kornia tosses a coin for the batch and one for each image: a quarter is mixed."""

    @jax.jit
    @jax.vmap
    def shares(key, u):
        images = jnp.zeros((20, 1, 1, 1))
        return [aug.mix(POLICIES[name].mixup, key, images, u)[1] for name in names]

    names = ("published", "repaired")
    published, repaired = shares(jax.random.split(KEY, 400), jnp.asarray(RNG.random((400, 20, 2))))
    assert abs((published > 0).any(axis=1).mean() - 0.5) < 0.1
    assert abs((published > 0).mean() - 0.25) < 0.06
    assert (repaired > 0).any(axis=1).all() and abs((repaired > 0).mean() - 0.5) < 0.03


# The policies.


@functools.cache
def batch(shape):
    """Images of all greys, the darkest and the lightest among them, half of the pixels dark."""
    images = np.random.default_rng(1).integers(0, 256, size=(ROWS, *shape)) / 127.5 - 1
    return jnp.asarray(images, jnp.float32)


def run(name, shape, seed=0):
    images, _ = augment(POLICIES[name], jax.random.key(seed), batch(shape))
    return np.asarray(images)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_on_every_size_and_stays_in_range(name, shape):
    images = run(name, shape)
    assert images.shape == (ROWS, *shape) and images.dtype == np.float32
    assert np.abs(images).max() <= 1 + 1e-6
    np.testing.assert_array_equal(images, run(name, shape))
    changed = np.abs(images - batch(shape)).max(axis=(1, 2, 3)) > 0
    if name == "none":
        assert not changed.any()
    else:
        assert changed.mean() > 0.5
        assert (images != run(name, shape, seed=1)).any()


def test_a_row_depends_on_its_image_and_key_alone():
    images, natural = batch((8, 8, 1)), POLICIES["natural"]
    seen = np.asarray(augment(natural, KEY, images)[0])
    others = augment(natural, KEY, images.at[1:].set(images[:-1]))[0]
    np.testing.assert_array_equal(seen[0], others[0])
    np.testing.assert_allclose(augment(natural, KEY, images[:5])[0], seen[:5], atol=1e-6)


def dark(images):
    return images < 0


def test_published_loses_the_dark_half_of_half_of_the_images_and_repaired_does_not():
    """Contrast, brightness and sharpness over 1 clamp: 1 - 0.75² (1 - 0.25 · 0.625) = 0.525.

    A quarter is mixed, and without a dark pixel only where its partner is too: 0.463 remain.
    """
    shape = (28, 28, 1)
    before = dark(batch(shape)).mean()
    lost = np.mean([~dark(run("published", shape, seed)).any(axis=(1, 2, 3)) for seed in range(8)])
    assert abs(lost - 0.463) < 0.08
    repaired = np.stack([run("repaired", shape, seed) for seed in range(8)])
    assert dark(repaired).any(axis=(2, 3, 4)).all()
    assert abs(dark(repaired).mean() - before) < 0.05
    published = np.mean([dark(run("published", shape, seed)).mean() for seed in range(8)])
    assert published < 0.65 * before


def test_the_labels_of_repaired_alone_are_mixed():
    told = {
        name for name in POLICIES if augment(POLICIES[name], KEY, batch((8, 8, 1)))[1] is not None
    }
    assert told == {"repaired"}


def test_rotation_brings_grey_corners_where_published_and_black_ones_where_repaired():
    for name, corner in (("published", 0.0), ("repaired", -1.0)):
        turn = POLICIES[name].operations[2].apply
        image = jax.jit(turn)(jnp.ones((28, 28, 1)), jnp.asarray([0.99]))
        assert image[0, 0, 0] == corner and image[14, 14, 0] == 1


def test_policies_that_mirror_say_so():
    assert {name for name in POLICIES if POLICIES[name].flips} == {
        "published",
        "repaired",
        "natural",
    }
