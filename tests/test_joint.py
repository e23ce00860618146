import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm import checkpoint
from jdm.data.splits import load_split
from jdm.errors import InvalidValue
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


def test_floats_of_any_precision_and_with_rounding_errors_are_images(joint, images):
    """Up to half a pixel level outside [-1, 1]."""
    x, expected = images / 127.5 - 1, jdm.classify(joint, images)
    for precise in (x.astype(np.float32) * 1.0000001, x * 1.003):
        np.testing.assert_allclose(jdm.classify(joint, precise), expected, atol=0.01)
    half = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_allclose(jdm.classify(joint, half), expected, atol=0.01)
    np.testing.assert_array_equal(joint.logits(half), joint.logits(jnp.asarray(half, jnp.float32)))


@pytest.mark.parametrize("method", ["denoise", "logits"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(x=np.zeros((3, 8, 8, 1), np.uint8)), "has the dtype uint8; .* pixels / 127.5 - 1"),
        (dict(x=np.zeros((3, 8, 8, 1), int)), "has the dtype int64; floats are needed$"),
        (dict(x=np.zeros((3, 8, 1), np.float32)), r"has the shape \(3, 8, 1\); this model takes"),
        (dict(x=np.full((3, 8, 8, 1), np.nan)), "has values that are not finite"),
        (dict(t=50), r"holds 50; noise levels lie in \[0, 50\)$"),
        (dict(t=np.array([0, -1, 3])), "holds -1; noise"),
        (dict(t=1.5), r"must be one integer, or 3 for as many images, not float64\(\)"),
        (dict(t=np.zeros(2, int)), r"must be one integer, or 3 .* not int64\(2,\)"),
    ],
)
def test_what_denoise_and_logits_refuse(joint, method, change, said):
    given = dict(x=np.zeros((3, 8, 8, 1), np.float32), t=np.zeros(3, int)) | change
    with pytest.raises(InvalidValue, match=f"^(xt?|t) {said}"):
        getattr(joint, method)(*given.values())


def test_inside_jit_shapes_and_dtypes_are_checked_and_values_are_not(joint):
    x, t = jnp.ones((3, 8, 8, 1)), jnp.array([0, 10, 49])
    for method in (joint.denoise, joint.logits):
        np.testing.assert_allclose(jax.jit(method)(x, t), method(x, t), atol=1e-4)
        jax.eval_shape(method, x, t + 50)
        with pytest.raises(InvalidValue, match="^xt? has the dtype uint8"):
            jax.jit(method)(x.astype(jnp.uint8), t)


def test_pixels_as_floats_are_warned_about(joint, images):
    with pytest.warns(UserWarning, match=r"^x has values above 20, .* pass pixels / 127.5 - 1"):
        joint.logits(images * 1.0)


@pytest.mark.parametrize(
    ("terms", "calls"),
    [
        (("classifier",), [lambda j, x: j.denoise(x, 0), lambda j, x: jdm.invert(j, x, steps=1)]),
        (("diffusion",), [lambda j, x: j.logits(x), lambda j, x: jdm.classify(j, x)]),
    ],
)
def test_what_a_model_was_not_trained_for_is_refused(joint, terms, calls):
    config = joint.config.copy_and_resolve_references()
    config.loss.terms = terms
    other, x = dataclasses.replace(joint, config=config), -np.ones((1, 8, 8, 1), np.float32)
    for call in calls:
        with pytest.raises(InvalidValue, match="^joint is a model that was trained "):
            call(other, x)


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
        (
            lambda x: (x / 127.5 - 1) * 1.005,
            r"over \[-1.005, 1.005\]; floats must lie in \[-1, 1\]",
        ),
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
