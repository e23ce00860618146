"""jdm.features: spatial means of the blocks' outputs, by block and noise level."""

import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm.analysis.features import widths
from jdm.data.splits import load_split
from jdm.errors import InvalidValue
from jdm.nn.unet import block_names


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


@pytest.fixture(scope="module")
def images():
    return load_split("digits", "test").images[:10]


def test_the_encoders_features_are_those_that_the_classifier_reads(joint, images):
    found = jdm.features(joint, images, t=0, batch_size=4)
    x, t = jnp.asarray(images / 127.5 - 1, jnp.float32), jnp.zeros(len(images), jnp.int32)
    z = joint.model.apply(joint.weights, x, t, method="encode")
    names = block_names(len(joint.model.multipliers), joint.model.blocks)
    for name, means in zip((names.mid, *names.skips), z.means(), strict=True):
        np.testing.assert_allclose(found.of(name), means, atol=1e-5)


def test_blocks_are_columns_in_the_order_of_computation(joint, images):
    names = list(widths(joint.model))
    assert names[0] == "stem" and names.index("mid") < names.index("up_0") < len(names) - 1
    whole = jdm.features(joint, images, t=0, batch_size=4)
    assert list(dict.fromkeys(whole.blocks)) == names
    chosen = jdm.features(joint, images, t=0, blocks=["up_0", "stem"], batch_size=4)
    assert list(dict.fromkeys(chosen.blocks)) == ["up_0", "stem"]
    np.testing.assert_allclose(chosen.of("stem"), whole.of("stem"), atol=1e-5)
    np.testing.assert_allclose(chosen.of("up_0"), whole.of("up_0"), atol=1e-5)


def test_noise_depends_on_the_seed_and_not_on_the_batch(joint, images):
    whole = jdm.features(joint, images, t=3, batch_size=10).values
    np.testing.assert_allclose(
        jdm.features(joint, images, t=3, batch_size=4).values, whole, atol=1e-5
    )
    later = jdm.features(joint, images[4:], t=3, seed=4, batch_size=4).values
    np.testing.assert_allclose(later, whole[4:], atol=1e-5)
    assert (
        np.abs(jdm.features(joint, images, t=3, seed=1, batch_size=4).values - whole).max() > 1e-3
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(t=10_000), r"^t=10000 must be a whole number in \[0, "),
        (dict(blocks="middle"), "^blocks='middle' is unknown; known: stem, "),
        (dict(batch_size=0), "^batch_size=0 must be positive"),
    ],
)
def test_wrong_values_are_refused(joint, images, wrong, said):
    with pytest.raises(InvalidValue, match=said):
        jdm.features(joint, images, **wrong)
