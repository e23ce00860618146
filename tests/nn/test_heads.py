"""jdm.nn.heads: the published head from its formulas, and the time that a head is given."""

import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.nn.heads import HEAD_TIMES, HEADS
from jdm.nn.heads.normalised import NormalisedHead
from jdm.nn.heads.published import BatchNorm, PublishedHead
from jdm.nn.unet import Features

RNG = np.random.default_rng(0)
ROWS = 6


def draw(*shape: int):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


FEATURES = Features(draw(ROWS, 2, 2, 5) + 1, (draw(ROWS, 4, 4, 3), draw(ROWS, 2, 2, 4)))
KEY = jax.random.key(0)
T = jnp.asarray([0, 1, 7, 30, 200, 499], jnp.int32)
EMBEDDING = draw(ROWS, 8)
HEAD = PublishedHead(num_classes=3, width=77, dropout=0.0)


def initial(head):
    """Shapes of what a head starts with."""
    return jax.eval_shape(lambda key: head.init(key, FEATURES, T, EMBEDDING, False), KEY)


@pytest.fixture(scope="module")
def weights():
    """Random parameters and statistics; variances are positive."""
    shapes = initial(HEAD)

    def fill(path, leaf):
        if leaf.dtype == jnp.int32:
            return jnp.int32(5)
        return jnp.abs(draw(*leaf.shape)) + 0.5 if path[-1].key == "var" else draw(*leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def run(weights):
    """run(t, train=False, weights=weights) -> (logits, the next batch_stats) of FEATURES."""
    given = weights

    @jax.jit
    def both(weights, t):
        trained = HEAD.apply(weights, FEATURES, t, EMBEDDING, True, mutable=["batch_stats"])
        used = HEAD.apply(weights, FEATURES, t, EMBEDDING, False, mutable=["batch_stats"])
        return {True: trained, False: used}

    def get(t, train=False, weights=given):
        logits, updated = both(weights, t)[train]
        return np.asarray(logits), updated["batch_stats"]

    return get


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def inputs(t):
    pooled = [np.asarray(z, np.float64).mean(axis=(1, 2)) for z in (FEATURES[0], *FEATURES[1])]
    return np.concatenate([*pooled, np.asarray(t, np.float64)[:, None]], axis=1)


def by_formula(weights, t, train):
    """(logits, {norm: (mean, var) after}), from the published formulas in float64."""
    params, stats = (float64(weights[name]) for name in ("params", "batch_stats"))
    after = {}

    def norm(name, x):
        mean, var = stats[name]["mean"], stats[name]["var"]
        if train:
            here = x.mean(axis=0), x.var(axis=0)
            after[name] = 0.9 * mean + 0.1 * here[0], 0.9 * var + 0.1 * x.var(axis=0, ddof=1)
            mean, var = here
        return (x - mean) / np.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    h = linear("in", norm("norm_in", inputs(t)))
    h = np.where(h > 0, h, 0.01 * h)
    return linear("out", norm("norm_out", h)), after


def test_the_published_head_is_its_formula(weights, run):
    assert weights["params"]["in"]["kernel"].shape == (5 + 3 + 4 + 1, 6)  # (F + 1, F // 2)
    logits, stats = run(T)
    np.testing.assert_allclose(logits, by_formula(weights, T, False)[0], rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_equal(stats, weights["batch_stats"])  # used, not changed


def test_in_training_it_normalises_by_the_batch_and_remembers_the_unbiased_variance(weights, run):
    logits, stats = run(T, train=True)
    expected, after = by_formula(weights, T, True)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    for name, (mean, var) in after.items():
        np.testing.assert_allclose(stats[name]["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats[name]["var"], var, rtol=1e-4)
        assert stats[name]["count"] == 6


def test_its_fault_a_time_that_was_always_zero_drowns_the_image_later(weights, run):
    """Running statistics as they are after 200 batches at t = 0, then t = 499."""
    zero = jnp.zeros_like(T)
    x = inputs(zero)
    seen = {"mean": x.mean(axis=0), "var": np.append(x.var(axis=0)[:-1], 0.9**200)}
    stats = weights["batch_stats"]
    stats = {**stats, "norm_in": {**stats["norm_in"], **seen}}
    clean, late = (run(t, weights={**weights, "batch_stats": stats})[0] for t in (zero, zero + 499))
    assert np.ptp(clean, axis=0).max() > 0.1 * np.abs(clean).max()
    assert np.abs(late).max() > 1000 * np.abs(clean).max()
    assert np.ptp(late, axis=0).max() < 1e-3 * np.abs(late).max()


@pytest.mark.parametrize("head", HEADS)
def test_head_time_zero_is_the_head_at_time_zero(tiny_model, head):
    raw, zero = (
        tiny_model(head=head, head_time=name, multipliers=(1,), attention=()) for name in HEAD_TIMES
    )
    x, t = jnp.zeros((3, 8, 8, 1)), jnp.asarray([0, 10, 49], jnp.int32)
    shapes = jax.eval_shape(raw.init, KEY, x, t)
    encode = functools.partial(raw.apply, method="encode")
    weights, features = jax.tree.map(
        lambda leaf: abs(draw(*leaf.shape)).astype(leaf.dtype),
        (shapes, jax.eval_shape(encode, shapes, x, t)),
    )

    @jax.jit
    def logits():
        cases = ((raw, 0 * t), (zero, t), (raw, t))
        return [model.apply(weights, features, at, method="classify") for model, at in cases]

    at_zero, given_zero, given_t = logits()
    np.testing.assert_array_equal(at_zero, given_zero)
    assert np.abs(given_t - given_zero)[1:].max() > 1e-3


def test_dropout_acts_before_each_norm_in_training(weights):
    head = PublishedHead(num_classes=3, width=0, dropout=0.7)

    @jax.jit
    def train(key):
        options = dict(mutable=["batch_stats"], rngs={"dropout": key})
        return head.apply(weights, FEATURES, T, EMBEDDING, True, **options)

    _, updated = train(KEY)
    mean = np.asarray(updated["batch_stats"]["norm_in"]["mean"])
    assert np.abs(mean - by_formula(weights, T, True)[1]["norm_in"][0]).max() > 1e-2


def test_a_batch_of_one_has_no_variance():
    with pytest.raises(ValueError, match=r"^config\.data\.batch_size=1 is too few .* 2 or more"):
        BatchNorm().init(jax.random.key(0), jnp.ones((1, 4)), True)


def test_the_normalised_head_keeps_no_statistics():
    head = NormalisedHead(num_classes=3, width=4, dropout=0.1)
    shapes = initial(head)
    assert set(shapes) == {"params"}


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jdm.mesh import make_mesh, to_global
from jdm.nn.heads.published import BatchNorm

x = to_global({"x": np.load(sys.argv[1])}, make_mesh())["x"]
assert len(x.addressable_shards) == 8
weights = {
    "params": {"scale": np.ones(3, "f"), "bias": np.zeros(3, "f")},
    "batch_stats": {"mean": np.zeros(3, "f"), "var": np.ones(3, "f"), "count": np.int32(0)},
}
run = jax.jit(lambda x: BatchNorm().apply(weights, x, True, mutable=["batch_stats"])[1])
np.savez(sys.argv[2], **run(x)["batch_stats"])
"""


def test_statistics_over_eight_devices_are_those_of_the_global_batch(tmp_path):
    x = np.asarray(draw(16, 3)) * 3 + np.arange(16, dtype=np.float32)[:, None]
    np.save(tmp_path / "in.npy", x)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, tmp_path / "in.npy", tmp_path / "out.npz"],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        timeout=120,
    )
    stats = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var(axis=0, ddof=1), rtol=1e-5)
    assert stats["count"] == 1
