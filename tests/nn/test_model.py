"""jdm.nn.model: shapes, dtypes, what the head reads, and sizes that do not fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm import names
from jdm.nn.model import check_shape, example_inputs


def noise(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, T = noise(0, 3, 8, 8, 1), jnp.asarray([0, 10, 500], jnp.int32)


@pytest.mark.parametrize(
    "changes, in_shape, out_channels",
    [
        ({}, (8, 8, 1), 1),
        ({"learned_variance": True, "image_channels": 3}, (8, 8, 3), 6),
        ({"resample": "resblock"}, (8, 8, 1), 1),
        ({"resample": "resblock", "time_conditioning": "add"}, (8, 8, 1), 1),
        ({"image_size": 28, "multipliers": (1, 2, 2), "attention": (28,)}, (28, 28, 1), 1),
        ({"dtype": "bfloat16"}, (8, 8, 1), 1),
        ({"dtype": "bfloat16", "head": "published"}, (8, 8, 1), 1),
        ({"multipliers": (1,), "attention": ()}, (8, 8, 1), 1),
        ({"channels": 20, "attention": (8, 4)}, (8, 8, 1), 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_output_has_the_shape_of_the_images_in_float32(tiny_model, changes, in_shape, out_channels):
    model = tiny_model(**changes)
    x, t = jnp.zeros((3, *in_shape)), jnp.zeros((3,), jnp.int32)
    (raw, logits), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x, t)
    assert (raw.shape, raw.dtype) == ((3, *in_shape[:2], out_channels), jnp.float32)
    assert (logits.shape, logits.dtype) == ((3, 10), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("resample", names.RESAMPLES)
def test_at_the_start_the_output_is_zero(tiny_model, tiny_params, starting_params, apply, resample):
    model = tiny_model(**({"resample": resample, "attention": ()} if resample != "conv" else {}))
    raw, logits = apply(model, starting_params(model), "predict", X, T)
    np.testing.assert_array_equal(raw, np.zeros_like(raw))
    assert np.isfinite(logits).all()
    later, _ = apply(model, tiny_params(model), "predict", X, T)
    assert np.isfinite(later).all() and np.ptp(later) > 0.1


def test_at_the_start_every_block_is_the_identity(tiny_model, starting_params, apply):
    model = tiny_model()
    features = apply(model, starting_params(model), "encode", X, T)
    np.testing.assert_array_equal(features.skips[1], features.skips[0])


def test_predict_is_encode_then_decode_and_classify(tiny_model, tiny_params, apply):
    model = tiny_model()
    params = tiny_params(model)
    raw, logits = apply(model, params, "predict", X, T)
    features = apply(model, params, "encode", X, T)
    np.testing.assert_allclose(apply(model, params, "decode", features, T), raw, atol=1e-5)
    np.testing.assert_allclose(apply(model, params, "classify", features, T), logits, atol=1e-5)
    assert np.abs(raw).max() > 0.1


def test_half_precision_computes_nearly_the_same(tiny_model, tiny_params, apply):
    single, half = tiny_model(), tiny_model(dtype="bfloat16")
    params = tiny_params(single)
    exact, rough = (apply(model, params, "encode", X, T) for model in (single, half))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rough), strict=True):
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.bfloat16)
        assert 1e-5 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


# The head.


@pytest.fixture(scope="module")
def logits(tiny_model, tiny_params, apply):
    model = tiny_model()
    return lambda x, t: np.asarray(apply(model, tiny_params(model), "predict", x, t)[1])


def test_logits_of_an_image_do_not_depend_on_the_rest_of_the_batch(logits):
    whole = logits(X, T)
    np.testing.assert_allclose(logits(X.at[1:].set(9.0), T.at[1:].set(77))[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(logits(X[::-1], T[::-1]), whole[::-1], atol=1e-5)


def test_logits_are_finite_and_move_with_the_time_and_the_image(logits):
    one = jnp.tile(X[:1], (3, 1, 1, 1))
    by_time = logits(one, jnp.asarray([0, 500, 999], jnp.int32))
    assert np.isfinite(by_time).all()
    assert np.abs(by_time).max() < 100  # no raw t in it
    assert min(np.abs(by_time[i] - by_time[j]).max() for i, j in ((0, 1), (1, 2))) > 1e-3
    by_image = logits(X, jnp.zeros(3, jnp.int32))
    assert np.abs(by_image[0] - by_image[1]).max() > 1e-3


def test_the_head_reads_every_representation_by_its_mean(tiny_model, tiny_params, apply):
    model = tiny_model()
    params = tiny_params(model)
    features = apply(model, params, "encode", X, T)
    plain = apply(model, params, "classify", features, T)
    leaves, tree = jax.tree.flatten(features)
    for i, z in enumerate(leaves):

        def with_(z, i=i):
            changed = jax.tree.unflatten(tree, [*leaves[:i], z, *leaves[i + 1 :]])
            return apply(model, params, "classify", changed, T)

        shuffled = z[:, ::-1, ::-1, :]  # the same means
        np.testing.assert_allclose(with_(shuffled), plain, atol=1e-5)
        assert np.abs(with_(z + noise(i, z.shape[-1])) - plain).max() > 1e-3


def test_the_head_reads_the_time_itself(tiny_model, tiny_params, apply):
    """The same representations at another t have other logits."""
    model = tiny_model()
    params = tiny_params(model)
    features = apply(model, params, "encode", X, T)
    early, late = (apply(model, params, "classify", features, t) for t in (T, T + 100))
    assert np.abs(early - late).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("where", ["dropout", "head_dropout"])
def test_dropout_acts_in_training(tiny_model, tiny_params, where):
    """And nowhere else: all the other tests have no key for it."""
    rates = {"dropout": 0.0, "head_dropout": 0.0, where: 0.5}
    model = tiny_model(multipliers=(1,), attention=(), **rates)
    params = {"params": tiny_params(model)}
    predict = jax.jit(lambda key: model.apply(params, X, T, True, rngs={"dropout": key}))
    (raw, logits), same, other = (predict(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(same[0], raw)
    np.testing.assert_array_equal(same[1], logits)
    assert (np.abs(other[0] - raw).max() > 1e-3) == (where == "dropout")
    assert np.abs(other[1] - logits).max() > 1e-3


# Sizes and names that do not fit.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": (5,)}, r"model\.attention=\(5,\) contains 5.*model\.image_size=8.*\(8, 4\)"),
        ({"attention": (4, 2)}, r"model\.attention=\(4, 2\) contains 2"),
        ({"image_size": 7}, r"model\.image_size=7 does not divide by 2.*model\.multipliers"),
        ({"image_size": 12, "multipliers": (1, 2, 2, 2)}, r"model\.image_size=12 .* 8"),
        ({"heads": 3}, r"model\.heads=3 does not divide the 16 channels"),
        # Only the middle attends, and its width counts too.
        ({"heads": 3, "attention": (), "multipliers": (3, 2)}, r"model\.heads=3 .* 16 channels"),
        ({"heads": 3, "attention": (8,), "multipliers": (2, 3)}, r"model\.heads=3 .* 16 channels"),
        ({"head_channels": 3}, r"model\.head_channels=3 does not divide the 16 channels"),
        ({"head_channels": 32}, r"model\.head_channels=32 does not divide the 16 channels"),
        ({"time_conditioning": "x"}, r"model\.time_conditioning='x' .* scale_shift, add"),
        ({"resample": "pool"}, r"model\.resample='pool' is unknown; known: conv, resblock"),
        ({"attention_order": "x"}, r"model\.attention_order='x' .* head_first, qkv_first"),
        ({"head": "linear"}, r"model\.head='linear' is unknown; known: normalised, published"),
        ({"head_time": "t"}, r"model\.head_time='t' is unknown; known: raw, zero"),
        ({"dtype": "float16"}, r"exec\.dtype='float16' is unknown; known: float32, bfloat16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_sentence_with_the_key(tiny_model, changes, message):
    model = tiny_model(**changes)
    with pytest.raises(ValueError, match=rf"^config\.{message}") as error:
        check_shape(model)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"^config\.{message}"):
        jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))


def test_every_known_name_fits(tiny_model):
    for key, known in {
        "resample": names.RESAMPLES,
        "time_conditioning": names.TIME_CONDITIONINGS,
        "attention_order": names.ATTENTION_ORDERS,
        "head": names.HEADS,
        "head_time": names.HEAD_TIMES,
        "dtype": names.DTYPES,
    }.items():
        for name in known:
            check_shape(tiny_model(**{key: name}))
    check_shape(tiny_model(heads=3, attention=(), multipliers=(1, 3)))
    check_shape(tiny_model(heads=3, head_channels=8))  # heads is not used


# Recomputing instead of keeping.


def kept_bytes(model, params) -> int:
    """What the forward pass keeps for the gradient, in bytes; nothing is computed."""
    x, t = jnp.zeros((64, 8, 8, 1)), jnp.zeros(64, jnp.int32)

    def outputs(params):
        return model.apply({"params": params}, x, t)

    _, backward = jax.eval_shape(lambda params: jax.vjp(outputs, params), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_remat_keeps_less_for_the_gradient_and_names_weights_alike(tiny_model, tiny_params):
    models = [tiny_model(resample="resblock", remat=remat) for remat in names.REMATS]
    params, *others = (tiny_params(model) for model in models)
    for other in others:
        chex.assert_trees_all_equal_shapes_and_dtypes(params, other)
    none, attention, blocks = (kept_bytes(model, params) for model in models)
    assert attention < 0.9 * none and blocks < none / 3


def test_remat_changes_no_gradient(tiny_model, tiny_params):
    """With dropout too, which has its keys from the names of the modules."""
    shape = dict(multipliers=(1,), attention=(8,), dropout=0.5)
    params, found = tiny_params(tiny_model(**shape)), []
    for remat in names.REMATS:
        model = tiny_model(**shape, remat=remat)

        def loss(params, model=model):
            rngs = {"dropout": jax.random.key(1)}
            out, logits = model.apply({"params": params}, X, T, train=True, rngs=rngs)
            return (out**2).sum() + (logits**2).sum()

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    for other in found[1:]:
        chex.assert_trees_all_close(found[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("implementation", "own_derivative"), [("xla", False), ("chunked", True)])
def test_attention_is_computed_as_the_config_says(
    tiny_model, tiny_params, implementation, own_derivative
):
    model = tiny_model(attention_implementation=implementation)
    params = tiny_params(tiny_model())
    x, t = example_inputs(model)
    traced = jax.make_jaxpr(lambda p: model.apply({"params": p}, x, t))(params)
    assert ("name=chunked" in str(traced)) == own_derivative
