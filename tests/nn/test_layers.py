"""Our layers are Flax's: the same parameters, initial values and outputs; and random dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.nn import layers

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
IMAGES = (2, 6, 6, 8)


def flax_conv(size, **more):
    return nn.Conv(4, (size, size), padding=(size - 1) // 2, **more)


PAIRS = {  # name: (ours, Flax's, the shape of the input)
    "dense": (layers.Dense(5), nn.Dense(5), IMAGES),
    "dense half": (layers.Dense(5, BF16), nn.Dense(5, dtype=BF16), (2, 8)),
    "conv": (layers.Conv(4, 3, F32), flax_conv(3), IMAGES),
    "conv stride": (layers.Conv(4, 3, F32, 2), flax_conv(3, strides=2), IMAGES),
    "conv 1x1 half": (layers.Conv(4, 1, BF16), flax_conv(1, dtype=BF16), IMAGES),
    "group norm": (layers.GroupNorm(4, 1e-5), nn.GroupNorm(4, epsilon=1e-5), IMAGES),
    "one group": (layers.GroupNorm(1, 1e-5), nn.GroupNorm(1, epsilon=1e-5), IMAGES),
    "layer norm": (layers.LayerNorm(), nn.LayerNorm(), (2, 8)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_and_outputs_are_those_of_flax(name):
    ours, theirs, shape = PAIRS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.normal(size=shape), jnp.float32)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(1), x))
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)
    found, expected = jax.jit(ours.apply)(params, x), jax.jit(theirs.apply)(params, x)
    assert found.dtype == expected.dtype
    # Flax's normalisations subtract the mean first; ours are off by a few roundings of it.
    np.testing.assert_allclose(found.astype(F32), expected.astype(F32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (8,), (8, 6)])
def test_a_weight_of_another_shape_is_refused(shape):
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(5)}
    with pytest.raises(AssertionError, match=r"\(8, 5\)"):
        layers.Dense(5).apply({"params": params}, jnp.zeros((2, 8)))


KEY = np.array([0, 7], np.uint32)


def signs(key, shape=(2**18,), bit=31):
    """+1 or -1 by one bit of each position."""
    bits = np.asarray(layers.random_bits(jnp.asarray(key), shape)).ravel()
    return (bits >> bit & 1) * 2.0 - 1


def uncorrelated(a, b):
    """Whether the mean of the products of signs is within five standard deviations of 0."""
    return abs((a * b).mean()) < 5 / np.sqrt(len(a))


def test_each_bit_is_set_for_half_of_the_positions_and_says_nothing_about_others():
    by_bit = [signs(KEY, bit=bit) for bit in range(32)]
    for bit, one in enumerate(by_bit):
        assert uncorrelated(one, np.ones_like(one)), bit
        assert uncorrelated(one, by_bit[bit - 1]), bit
        for lag in (1, 2, 3, 8, 64, 1024, 2**15):
            assert uncorrelated(one[lag:], one[:-lag]), (bit, lag)


def test_keys_that_differ_in_one_bit_give_other_bits():
    for word in (0, 1):
        for bit in range(32):
            other = KEY.copy()
            other[word] ^= np.uint32(1 << bit)
            assert uncorrelated(signs(KEY), signs(other)), (word, bit)


def test_the_bits_are_those_of_the_index_whatever_the_shape():
    flat = layers.random_bits(jnp.asarray(KEY), (24,))
    np.testing.assert_array_equal(layers.random_bits(jnp.asarray(KEY), (2, 3, 4)).ravel(), flat)


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_dropout_keeps_its_share_and_the_mean(rate):
    x = jnp.full((64, 8, 8, 32), 2.0)
    layer, n = layers.Dropout(rate), x.size

    def apply(key, train=True):
        return np.asarray(layer.apply({}, x, train, rngs={"dropout": jax.random.key(key)}))

    found = apply(0)
    np.testing.assert_allclose(np.unique(found), [0, 2 / (1 - rate)], rtol=1e-6)
    assert abs((found == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    for axis in range(4):  # no line of positions is dropped as a whole
        share = (found == 0).mean(axis=tuple(a for a in range(4) if a != axis))
        spread = np.sqrt(rate * (1 - rate) * x.shape[axis] / n)
        assert np.abs(share - rate).max() < 5 * spread
    assert (found != apply(1)).mean() > rate * (1 - rate)
    np.testing.assert_array_equal(found, apply(0))
    np.testing.assert_array_equal(apply(0, train=False), x)
