import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm import checkpoint
from jdm.data.splits import load_split
from jdm.joint import make_network
from jdm.mesh import make_mesh
from jdm.trainer import prepare


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


@pytest.fixture(scope="module")
def images():
    return load_split("digits", "test").images[:10]


def test_load_takes_the_ema(tiny, joint):
    """Step 4 of the EMA of a run, and not the weights of the run at that step."""
    state = prepare(joint.config, make_mesh()).state
    rest = {name: value for name, value in vars(state).items() if name != "ema"}
    rest = {name: value for name, value in rest.items() if value is not None}
    saved = checkpoint.restore(tiny, 4, weights=state.ema, train_state=rest)
    jax.tree.map(np.testing.assert_array_equal, joint.weights, saved["weights"])
    both = joint.params, saved["train_state"]["params"]
    for ema, raw in zip(*map(jax.tree.leaves, both), strict=True):
        assert (np.asarray(ema) != raw).any()
    assert joint.params is joint.weights["params"] and joint.weights["batch_stats"] == {}
    assert joint.config.model.channels == 8 and joint.diffusion.steps == 50


def test_a_step_by_number_or_by_path(tiny):
    two = jdm.load(tiny, step=2)
    also = jdm.load(tiny / "checkpoints" / "2")
    jax.tree.map(np.testing.assert_array_equal, two.params, also.params)
    newest = jdm.load(tiny)
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(two.params), jax.tree.leaves(newest.params), strict=True)
    )


def test_denoise_and_logits_are_those_of_the_model(joint):
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t = jnp.array([0, 10, 49], jnp.int32)
    raw, logits = joint.model.apply({"params": joint.params}, x, t)
    np.testing.assert_allclose(joint.logits(x, t), logits, atol=1e-5)
    np.testing.assert_allclose(
        joint.denoise(x, t), joint.diffusion.estimate(raw, x, t).eps, atol=1e-4
    )
    np.testing.assert_allclose(joint.logits(x), joint.logits(x, jnp.zeros(3, jnp.int32)))


def test_the_classifier_that_guides_is_given_the_t_of_the_image(joint):
    x, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([0, 10, 49], jnp.int32)
    network = make_network(joint.model, joint.diffusion, joint.weights)
    ours = network.log_probabilities(network.encode(x, t), t)
    np.testing.assert_allclose(ours, jax.nn.log_softmax(joint.logits(x, t)), atol=1e-5)
    at_zero = network.log_probabilities(network.encode(x, t), 0 * t)
    assert np.abs(ours - at_zero)[1:].max() > 1e-3


def test_probabilities_sum_to_one_at_any_batch_size(joint, images):
    whole = jdm.classify(joint, images)
    assert whole.shape == (10, 10) and whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(jdm.classify(joint, images, batch_size=4), whole, atol=1e-6)
    assert jdm.classify(joint, images[:0]).shape == (0, 10)


def test_floats_in_minus_one_to_one_are_the_same_images(joint, images):
    floats = images / 127.5 - 1
    np.testing.assert_allclose(jdm.classify(joint, floats), jdm.classify(joint, images), atol=1e-6)


def test_path_in_place_of_joint(tiny, joint, images):
    np.testing.assert_array_equal(jdm.classify(str(tiny), images), jdm.classify(joint, images))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: x[0], "shape"),
        (lambda x: x[:, :4], "8, 8, 1"),
        (lambda x: x.astype(np.int32), "int32"),
        (lambda x: x / 1.0, r"must lie in \[-1, 1\]"),
        (lambda x: x / 127.5 - 1 + np.nan, r"must lie in \[-1, 1\]"),
    ],
)
def test_images_of_another_shape_or_range(joint, images, make, said):
    with pytest.raises(ValueError, match=said):
        jdm.classify(joint, make(images))


def test_floats_that_are_never_negative_are_warned_about(joint, images):
    with pytest.warns(UserWarning, match=r"\[0, 1\].*\[-1, 1\].*2 \* images - 1"):
        jdm.classify(joint, images / 255)


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_a_path_that_holds_nothing(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=str(path)):
        jdm.load(path)
