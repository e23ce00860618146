"""Our layers are Flax's: the same parameters, initial values and outputs."""

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
