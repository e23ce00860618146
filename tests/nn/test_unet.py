"""jdm.nn.unet: the network of the published recipes, and feature perturbations inside it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jdm.nn.unet import (
    RESIZES,
    Attention,
    Features,
    Norm,
    UNet,
    conv3x3,
    level_sizes,
    time_embedding,
)


def noise(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def at_init(unet: UNet, in_channels: int):
    """Shapes of the parameters and of the output; nothing is computed."""

    def init(key):
        x = jnp.zeros((2, unet.image_size, unet.image_size, in_channels))
        t = jnp.zeros((2,), jnp.int32)

        def pass_through(unet, x, t):
            return unet.decode(unet.encode(x, t), t)

        out, variables = unet.init_with_output(key, x, t, method=pass_through)
        return variables["params"], out

    return jax.eval_shape(init, jax.random.key(0))


FLOAT = jnp.dtype("float32")
PUBLISHED = dict(blocks=3, heads=4, dropout=0.3, dtype=FLOAT)


@pytest.mark.parametrize(
    "in_channels, parameters, shape",
    [
        (3, 52_542_979, dict(image_size=32, channels=128, multipliers=(1, 2, 2, 2))),
        (1, 8_799_105, dict(image_size=28, channels=64, multipliers=(1, 2, 2))),
        (1, 2_207_169, dict(image_size=28, channels=32, multipliers=(1, 2, 2))),
    ],
    ids=["cifar10", "fashion_mnist", "small"],
)
def test_published_networks_have_their_number_of_parameters(in_channels, parameters, shape):
    attention = (28,) if shape["image_size"] == 28 else (16, 8)
    unet = UNet(**PUBLISHED, **shape, attention=attention, out_channels=in_channels)
    params, out = at_init(unet, in_channels)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert out.shape == (2, unet.image_size, unet.image_size, in_channels)


def test_attention_is_at_the_given_sides_and_in_the_middle():
    shape = dict(image_size=28, channels=8, multipliers=(1, 2, 2), out_channels=1)
    for attention, levels in {(): set(), (28,): {0}, (14, 7): {1, 2}}.items():
        params, _ = at_init(UNet(**{**PUBLISHED, "blocks": 1}, **shape, attention=attention), 1)
        attends = {name for name, block in params.items() if "attention" in block}
        coders = {
            f"{coder}_{level}_{i}"
            for level in levels
            for coder, count in (("encoder", 1), ("decoder", 2))
            for i in range(count)
        }
        assert attends == coders | {"mid_in"}


# Blocks.


def random_params(module, x) -> dict:
    """Noise in the shape of the module's parameters, by path."""
    params = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return {path: noise(i, *leaf.shape) for i, (path, leaf) in enumerate(params.items())}


@jax.jit
def group_norm(x):
    """Norm as it starts, with scale 1 and shift 0."""
    ones = jnp.ones(x.shape[-1])
    return Norm(FLOAT).apply({"params": {"norm": {"scale": ones, "bias": 0 * ones}}}, x)


@pytest.mark.parametrize(
    "channels, groups", [(1, 1), (7, 7), (20, 20), (32, 32), (48, 24), (37, 1), (96, 32)]
)
def test_group_norm_has_the_most_groups_up_to_32_that_divide(channels, groups):
    x = 3 * noise(channels, 2, 3, 3, channels) + 1
    ours = group_norm(x)
    grouped = np.asarray(x, np.float64).reshape(2, 9, groups, channels // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    expected = (grouped - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(ours, expected.reshape(x.shape), atol=1e-4)


def test_group_norm_keeps_a_small_signal_small():
    """Its epsilon is 1e-5, not Flax's 1e-6."""
    x = 1e-3 * noise(0, 1, 8, 8, 1)
    ours = group_norm(x)
    variance = np.var(x)
    np.testing.assert_allclose(np.var(ours), variance / (variance + 1e-5), rtol=1e-3)


def test_time_embedding_has_cosines_first_and_the_published_frequencies():
    t = jnp.asarray([0, 1, 999], jnp.int32)
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    angles = np.asarray(t)[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(time_embedding(t, 8), expected, atol=1e-3)


def test_convolutions_pad_every_side_by_one_also_at_stride_two():
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)  # reads the pixel up and to the left
    x = jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    moved = conv3x3(1, FLOAT, stride=2).apply(
        {"params": {"kernel": kernel, "bias": jnp.zeros(1)}}, x
    )
    np.testing.assert_array_equal(moved[0, :, :, 0], [[0, 0], [0, 6]])


def test_resizes_are_nearest_and_average():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    big = RESIZES["up"](x)
    np.testing.assert_array_equal(big[0, :, :, 0], np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    np.testing.assert_array_equal(RESIZES["down"](big), x)
    assert RESIZES["down"](x).item() == 1.5


def test_attention_orders_are_the_same_columns_in_another_order():
    heads, channels = 2, 12  # with 3 heads, one order would be the inverse of the other
    x = noise(0, 2, 2, 2, channels)
    by_head = Attention(heads, FLOAT, "head_first")
    params = random_params(by_head, x)
    ours = jax.jit(by_head.apply)({"params": unflatten_dict(params)}, x)
    assert np.abs(ours - x).max() > 0.1

    # Column (head, which of q k v, channel) goes to (which of q k v, head, channel).
    order = np.arange(3 * channels).reshape(heads, 3, -1).swapaxes(0, 1).ravel()
    for name in ("kernel", "bias"):
        params["qkv", name] = params["qkv", name][..., order]
    by_kind = Attention(heads, FLOAT, "qkv_first")
    other = jax.jit(by_kind.apply)({"params": unflatten_dict(params)}, x)
    np.testing.assert_allclose(other, ours, atol=1e-5)


def test_attention_is_softmax_of_scaled_products():
    """One head, in float64, from the formula."""
    x = noise(0, 1, 2, 2, 4)
    module = Attention(1, FLOAT)
    params = random_params(module, x)
    h = jax.jit(Norm(FLOAT).apply)({"params": unflatten_dict(params)["norm"]}, x)
    h = np.asarray(h, np.float64).reshape(4, 4)
    q, k, v = np.split(h @ params["qkv", "kernel"] + params["qkv", "bias"], 3, axis=1)
    weights = np.exp(q @ k.T / np.sqrt(4))
    weights /= weights.sum(axis=1, keepdims=True)
    out = weights @ v @ params["project", "kernel"] + params["project", "bias"]
    ours = jax.jit(module.apply)({"params": unflatten_dict(params)}, x)
    np.testing.assert_allclose(ours.reshape(4, 4), x.reshape(4, 4) + out, atol=1e-3)


# Sizes.


def test_levels_halve():
    assert level_sizes(28, 3) == (28, 14, 7)
    assert level_sizes(7, 1) == (7,)


@pytest.mark.parametrize("size, levels, divisor", [(28, 4, 8), (7, 2, 2), (30, 3, 4)])
def test_a_size_that_does_not_halve_evenly_is_one_sentence_with_the_key(size, levels, divisor):
    with pytest.raises(ValueError, match=rf"^config\.model\.image_size={size} .* {divisor}, .*$"):
        level_sizes(size, levels)


# Feature perturbations.

X, T = noise(0, 3, 8, 8, 1), jnp.asarray([0, 10, 500], jnp.int32)


@pytest.fixture(scope="module")
def encode(tiny_model, tiny_params, apply):
    """encode(perturbations, change={path: delta}) -> Features of X, with parameters changed."""
    model = tiny_model()
    params = tiny_params(model)

    def run(perturbations=None, change=()):
        flat = flatten_dict(params["unet"])
        for path, delta in dict(change).items():
            flat[path] = flat[path] + delta
        changed = {**params, "unet": unflatten_dict(flat)}
        return apply(model, changed, "encode", X, T, *filter(None, [perturbations]))

    return run


assert_close = functools.partial(chex.assert_trees_all_close, atol=2e-5)


def test_features_are_every_output_of_the_encoder_in_order(encode):
    features = encode()
    # stem, level 0: block; down, level 1: block.
    assert [z.shape[1:] for z in features.skips] == [(8, 8, 8), (8, 8, 8), (4, 4, 8), (4, 4, 16)]
    assert features.mid.shape[1:] == (4, 4, 16)


def test_zero_perturbations_change_nothing(encode):
    plain = encode()
    assert_close(encode(jax.tree.map(jnp.zeros_like, plain)), plain)


@pytest.mark.parametrize(
    "place, bias",
    [
        (0, ("stem", "bias")),
        (1, ("encoder_0_0", "residual", "conv_out", "bias")),
        (2, ("down_0", "conv", "bias")),
        (3, ("encoder_1_0", "attention", "project", "bias")),
        (4, ("mid_out", "residual", "conv_out", "bias")),  # the bottleneck, after the skips
    ],
)
def test_later_blocks_read_a_perturbation_as_part_of_the_layers_output(encode, place, bias):
    """One number per channel, added to the bias that ends the layer, must do the same."""
    plain = encode()
    before = [*plain.skips, plain.mid]
    delta = noise(1, before[place].shape[-1])
    added = [np.zeros_like(z) + (delta if i == place else 0) for i, z in enumerate(before)]
    perturbed = encode(Features(added[-1], tuple(added[:-1])))
    assert_close(perturbed, encode(change={bias: delta}))
    after = [*perturbed.skips, perturbed.mid]
    for i in range(place):
        np.testing.assert_allclose(after[i], before[i], atol=1e-6)
    np.testing.assert_allclose(after[place], before[place] + delta, atol=1e-5)
    for i in range(place, len(before)):
        assert np.abs(after[i] - before[i]).max() > 1e-2
