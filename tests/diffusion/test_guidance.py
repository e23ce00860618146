"""jdm.diffusion.guidance on a mixture of Gaussians, whose exact gradients are known.

How the representations move is tested in test_representations.py; how far guidance moves the images
of trained networks, in tests/test_digits_models.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.diffusion.guidance import GUIDANCE, SCALE_SCHEDULES, Network, guide, log_probabilities_of
from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, Estimate

DIFFUSION = Diffusion(200)
SHAPE = (2, 2, 1)
TIMES = jnp.asarray([0, 20, 60, 120, 199], jnp.int32)
LABELS = jnp.asarray([0, 1, 2, 1, 0], jnp.int32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, *SHAPE)), jnp.float32)
# Data: three equally likely classes, each a Gaussian around its own image.
CENTRES = np.random.default_rng(0).uniform(-0.8, 0.8, size=(3, *SHAPE))
VARIANCE = 0.15


@functools.partial(jax.jit, static_argnums=(0, 1))
def guided(network, method, targets, scale, x, t):
    return guide(network, DIFFUSION, method, targets, scale)(x, t)


def run(guidance, network, labels=LABELS, scale=1.0, x=X, t=TIMES, **options):
    """The guided estimate. labels: of 3 classes, where -1 is a row of zeros, or targets."""
    targets = jax.nn.one_hot(labels, 3) if labels.ndim == 1 else labels
    return guided(network, Method(guidance=guidance, **options), targets, jnp.float32(scale), x, t)


# The exact noise estimate and the exact classifier, in float64.


def class_scores(x, abar):
    """log p(x_t | class) up to a constant [B, K], of float64 x [B, ...] and abar [B]."""
    variance = abar * VARIANCE + 1 - abar
    offsets = x[:, None] - np.sqrt(abar)[:, None, None, None, None] * CENTRES
    return -(offsets**2).sum(axis=(2, 3, 4)) / (2 * variance[:, None])


def class_eps(x, abar):
    """E[eps | x_t, class] [B, K, ...]."""
    wide = abar[:, None, None, None, None]
    variance = wide * VARIANCE + 1 - wide
    return np.sqrt(1 - wide) * (x[:, None] - np.sqrt(wide) * CENTRES) / variance


@functools.cache
def mixture(diffusion: Diffusion) -> Network:
    """The same in JAX, split into encoder, decoder and classifier."""

    def parts(features, t):
        abar = jnp.asarray(diffusion.abar, jnp.float32)[t]
        scores = -features["distance"] / (2 * (abar * VARIANCE + 1 - abar)[:, None])
        return abar[:, None, None, None, None], scores

    def encode(x, t, perturbations=None):
        image = x if perturbations is None else x + perturbations["image"]
        a = jnp.sqrt(jnp.asarray(diffusion.abar, jnp.float32)[t])
        offsets = image[:, None] - a[:, None, None, None, None] * CENTRES
        distance = (offsets**2).sum(axis=(2, 3, 4))
        if perturbations is not None:
            distance = distance + perturbations["distance"]
        return {"image": image, "distance": distance}

    def decode(features, x, t):
        abar, scores = parts(features, t)
        shares = jax.nn.softmax(scores)[:, :, None, None, None]
        offsets = features["image"][:, None] - jnp.sqrt(abar) * CENTRES
        eps = jnp.sqrt(1 - abar) * offsets / (abar * VARIANCE + 1 - abar)
        return Estimate((shares * eps).sum(axis=1), jnp.tanh(features["image"]))

    return Network(encode, decode, lambda z, t: jax.nn.log_softmax(parts(z, t)[1]))


NETWORK = mixture(DIFFUSION)


def exact():
    """(E[eps | x_t, class] [5, K, ...], E[eps | x_t]) at (X, TIMES), float64."""
    x, abar = np.asarray(X, np.float64), DIFFUSION.abar[np.asarray(TIMES)]
    scores = class_scores(x, abar)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    each = class_eps(x, abar)
    return each, (shares[:, :, None, None, None] * each).sum(axis=1)


def test_none_is_the_network():
    estimate = run("none", NETWORK)
    eps_fn = guide(NETWORK, DIFFUSION, Method(guidance="none"), None, 0.0)
    np.testing.assert_allclose(estimate.eps, exact()[1], atol=1e-4)
    np.testing.assert_allclose(estimate.log_variance, np.tanh(X), atol=1e-6)
    chex.assert_trees_all_equal(eps_fn(X, TIMES), estimate)


@pytest.mark.parametrize("scale", [1.0, 2.5, -1.0, 0.0])
def test_pixel_subtracts_the_gradient_of_the_classifier_from_eps(scale):
    each, eps = exact()
    # grad log p(y | x) = grad log p(x | y) - grad log p(x), and eps = -sqrt(1 - abar) grad log p.
    of_label = each[np.arange(5), np.asarray(LABELS)]
    estimate = run("pixel", NETWORK, scale=scale)
    np.testing.assert_allclose(estimate.eps, eps + scale * (of_label - eps), atol=2e-4)


def test_pixel_at_scale_one_samples_the_requested_class(draw):
    labels = jnp.arange(3, dtype=jnp.int32).repeat(400)
    diffusion, method = Diffusion(200, variance="fixed_small"), Method(guidance="pixel")
    eps_fn = guide(mixture(diffusion), diffusion, method, jax.nn.one_hot(labels, 3), 1.0)
    keys = jax.vmap(jax.random.key)(np.arange(1200))
    images = draw(eps_fn, diffusion, keys, SHAPE, steps=200, threshold="none")
    images = images.reshape(3, 400, *SHAPE)
    # 400 draws: the standard error of the mean is 5 % of the deviation, that of the deviation
    # 3.5 %; 200 steps make it about 4 % too small.
    deviation = np.sqrt(VARIANCE)
    np.testing.assert_allclose(images.mean(axis=1), CENTRES, atol=0.2 * deviation)
    np.testing.assert_allclose(images.std(axis=1), deviation, rtol=0.18)


def test_pixel_guidance_leaves_the_variance_unchanged():
    estimate = run("pixel", NETWORK, scale=3.0)
    assert np.abs(estimate.eps - run("none", NETWORK).eps).max() > 0.1
    np.testing.assert_allclose(estimate.log_variance, np.tanh(X), atol=1e-6)


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_a_network_without_learned_variance_has_none_under_guidance(guidance):
    fixed = NETWORK._replace(decode=lambda z, x, t: Estimate(NETWORK.decode(z, x, t).eps))
    assert run(guidance, fixed).log_variance is None


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_each_row_is_guided_independently(guidance):
    whole = run(guidance, NETWORK)
    one = run(guidance, NETWORK, labels=LABELS[2:3], x=X[2:3], t=TIMES[2:3])
    np.testing.assert_allclose(one.eps[0], whole.eps[2], atol=1e-5)
    other = run(guidance, NETWORK, labels=LABELS.at[0].set(2))
    np.testing.assert_allclose(other.eps[1:], whole.eps[1:], atol=1e-6)
    assert np.abs(other.eps[0] - whole.eps[0]).max() > 1e-3


# Targets.


@pytest.mark.parametrize("guidance", [name for name in GUIDANCE if name != "none"])
def test_a_row_of_zeros_is_not_guided(guidance):
    mixed = run(guidance, NETWORK, labels=LABELS.at[1].set(-1).at[3].set(-1), scale=2.0).eps
    guided, plain = run(guidance, NETWORK, scale=2.0).eps, run("none", NETWORK).eps
    expected = guided.at[1].set(plain[1]).at[3].set(plain[3])
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert np.abs(guided - plain).max(axis=(1, 2, 3))[np.array([1, 3])].min() > 1e-3


def test_a_distribution_weights_the_gradients_of_its_classes():
    weights = np.random.default_rng(4).dirichlet([1, 1, 1], size=5)
    each, eps = exact()
    toward = (weights[:, :, None, None, None] * each).sum(axis=1)
    ours = run("pixel", NETWORK, labels=jnp.asarray(weights, jnp.float32), scale=2.0)
    np.testing.assert_allclose(ours.eps, eps + 2 * (toward - eps), atol=4e-4)


def test_the_outcomes_of_a_multi_label_classifier_are_labels_on_and_off():
    logits = jnp.asarray([[2.0, -1.0], [0.0, 30.0]])
    log_p = log_probabilities_of(logits, multi_label=True)
    on, off = np.split(np.exp(np.asarray(log_p, np.float64)), 2, axis=1)
    np.testing.assert_allclose(on, 1 / (1 + np.exp(-np.asarray(logits, np.float64))), rtol=1e-5)
    np.testing.assert_allclose(off, 1 / (1 + np.exp(np.asarray(logits, np.float64))), rtol=1e-4)
    one = np.exp(np.asarray(log_probabilities_of(logits, multi_label=False)))
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("guidance", [name for name in GUIDANCE if name != "none"])
def test_the_classifier_is_asked_at_the_t_of_the_image(guidance):
    """A classifier that always answers for t = 0 would guide elsewhere."""
    at_zero = NETWORK._replace(
        log_probabilities=lambda z, t: NETWORK.log_probabilities(z, jnp.zeros_like(t))
    )
    given, ours, wrong = [], run(guidance, NETWORK).eps, run(guidance, at_zero).eps

    def log_probabilities(features, t):
        jax.debug.callback(lambda t: given.append(np.asarray(t)), t)
        return NETWORK.log_probabilities(features, t)

    watched = NETWORK._replace(log_probabilities=log_probabilities)
    np.testing.assert_allclose(run(guidance, watched).eps, ours, atol=1e-6)
    jax.effects_barrier()
    assert given and all((t == TIMES).all() for t in given)
    assert np.abs(ours - wrong)[np.asarray(TIMES) > 0].max() > 1e-3


# The scale.


def test_default_scales():
    """That of `published` is the published one; the others were chosen (docs/results.md)."""
    expected = dict(none=0.0, pixel=6.0, representation=0.7, published=1000.0)
    assert {name: one.default_scale for name, one in GUIDANCE.items()} == expected


@pytest.mark.parametrize("schedule", SCALE_SCHEDULES)
def test_a_schedule_multiplies_the_scale_by_factors_of_mean_1(schedule):
    u = jnp.linspace(0, 1, 1001)
    assert SCALE_SCHEDULES[schedule](u).mean() == pytest.approx(1, abs=2e-3)
    # TIMES run from 0 to 199 of 200 times, and so u from 0 to 1.
    factors = np.asarray(SCALE_SCHEDULES[schedule](TIMES / 199))[:, None, None, None]
    plain = run("none", NETWORK).eps
    constant = run("pixel", NETWORK, scale=2.0).eps - plain
    ours = run("pixel", NETWORK, scale=2.0, scale_schedule=schedule).eps - plain
    np.testing.assert_allclose(ours, factors * constant, atol=1e-5)


def test_one_program_serves_every_scale():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def eps(scale):
        method = Method(guidance="pixel")
        return guide(NETWORK, DIFFUSION, method, jax.nn.one_hot(LABELS, 3), scale)(X, TIMES).eps

    chex.clear_trace_counter()
    assert np.abs(eps(jnp.float32(1.0)) - eps(jnp.float32(2.0))).max() > 1e-3
