"""jdm.analysis.evaluators.likelihood: the variational bound in bits per dimension."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.analysis.evaluators.likelihood import Bound, image_bounds, strata
from jdm.config import load_config
from jdm.data.splits import Split, load_split
from jdm.diffusion.process import VARIANCES, Diffusion
from jdm.errors import InvalidValue
from jdm.joint import Joint
from jdm.nn.model import JointModel, make_model, weight_shapes

T, BATCH = 6, 8


class Known(JointModel):
    """A network that knows that every pixel is grey, but for errors of 0.02 (t + 1); its estimates
    do not depend on the noise. Where the variance is learned, the fraction f of (4) is 3/4."""

    def encode(self, x, t):
        return x

    def decode(self, features, t):
        raw = jnp.broadcast_to(0.02 * (t[:, None, None, None] + 1.0), features.shape)
        return jnp.concatenate([raw, 0 * raw + 0.5], axis=-1) if self.learned_variance else raw


class Noisy(JointModel):
    """A network whose estimate of x_0 is twice x_t, which is often outside [-1, 1]."""

    def encode(self, x, t):
        return x

    def decode(self, features, t):
        return 2 * features


@pytest.fixture(scope="module")
def loaded():
    """A model with random weights."""
    config = load_config("tiny")
    model, rng = make_model(config.model, config.exec), np.random.default_rng(0)
    weights = jax.tree.map(
        lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), weight_shapes(model)
    )
    return Joint(config, model, Diffusion(60), {"batch_stats": {}, **weights})


def joint_of(loaded, kind, variance="fixed_small", levels=T, **fields):
    """A joint whose network is of this kind. The fields replace those of the model."""
    values = {f.name: getattr(loaded.model, f.name) for f in dataclasses.fields(JointModel)}
    del values["parent"], values["name"]
    model = kind(**values | fields | dict(learned_variance=variance == "learned"))
    diffusion = Diffusion(levels, "cosine", "x0", variance)
    return dataclasses.replace(loaded, model=model, diffusion=diffusion, weights={})


def grey(count: int) -> np.ndarray:
    return np.full((count, 8, 8, 1), 127, np.uint8)


X0 = 127 / 127.5 - 1


def log_variances(diffusion) -> np.ndarray:
    small, large = diffusion.small_log_variance, np.log(diffusion.betas)
    learned = 0.75 * large + 0.25 * small
    return {"fixed_small": small, "learned": learned}.get(
        diffusion.variance, diffusion.large_log_variance
    )


@pytest.mark.parametrize("variance", VARIANCES)
def test_every_term_of_the_bound_is_the_closed_form(loaded, variance):
    joint = joint_of(loaded, Known, variance)
    diffusion, found = joint.diffusion, image_bounds(joint, grey(3), batch_size=BATCH)
    guess, log_variance = 0.02 * np.arange(1, T + 1), log_variances(diffusion)
    # For t > 0: both Gaussians have d x_t in their means, so that c (x_0 - guess) is between them.
    before = np.append(1.0, diffusion.abar[:-1])
    c = np.sqrt(before) * diffusion.betas / (1 - diffusion.abar)
    ratio = log_variance - diffusion.small_log_variance
    error = (c * (X0 - guess)) ** 2 * np.exp(-log_variance)
    terms = 0.5 * (ratio - 1 + np.exp(-ratio) + error) / np.log(2)
    # At t = 0: the mass of a Gaussian around the guess, in the bin of the pixel.
    cdf = norm(guess[0], np.exp(0.5 * log_variance[0])).cdf
    terms[0] = -np.log2(cdf(X0 + 1 / 255) - cdf(X0 - 1 / 255))
    np.testing.assert_allclose(found.terms, np.tile(terms, (3, 1)), rtol=2e-3, atol=1e-6)
    prior = diffusion.prior_bound(jnp.full((3, 8, 8, 1), X0))
    np.testing.assert_allclose(found.prior, prior, rtol=1e-3, atol=1e-9)


def test_the_prior_is_a_divergence_between_gaussians():
    """By a sum over a grid; with three levels, x_{T-1} still shows the image."""
    diffusion = Diffusion(3)
    abar, z = diffusion.abar[-1], np.linspace(-12, 12, 20_001)
    for x0 in (-1.0, X0, 0.7):
        q, p = norm(np.sqrt(abar) * x0, np.sqrt(1 - abar)), norm(0, 1)
        nats = (q.pdf(z) * (q.logpdf(z) - p.logpdf(z))).sum() * (z[1] - z[0])
        found = diffusion.prior_bound(jnp.full((2, 4, 4, 1), x0))
        np.testing.assert_allclose(found, nats / np.log(2), rtol=1e-4)


def test_a_bound_is_the_prior_and_every_term_as_often_as_its_stratum_has_levels():
    prior, terms = np.array([0.5, 2.0]), np.array([[1.0, 10.0, 100.0], [2.0, 0.0, 0.0]])
    bound = Bound(prior, terms, np.array([0, 1, 3, 6], np.int32))
    np.testing.assert_allclose(bound.per_image, [0.5 + 1 + 20 + 300, 4.0])


def test_the_estimate_of_x0_is_clipped(loaded):
    """The error of clipped estimates is known at every t, as a sum over the noise of a pixel."""
    joint = joint_of(loaded, Noisy)
    diffusion, found = joint.diffusion, image_bounds(joint, grey(64), batch_size=64)
    before = np.append(1.0, diffusion.abar[:-1])
    c = np.sqrt(before) * diffusion.betas / (1 - diffusion.abar)
    z = np.linspace(-12, 12, 20_001)
    for t in range(1, T):
        a, b = (float(s[0, 0, 0, 0]) for s in diffusion.scales(jnp.array([t])))
        square = norm.pdf(z) * (X0 - np.clip(2 * (a * X0 + b * z), -1, 1)) ** 2
        error = c[t] ** 2 * square.sum() * (z[1] - z[0])
        expected = 0.5 * error * np.exp(-diffusion.small_log_variance[t]) / np.log(2)
        assert found.terms[:, t].mean() == pytest.approx(expected, rel=0.05)


def test_strata_divide_the_levels_and_each_has_one_or_more():
    for levels in (1, 2, 7, 500, 1000, 4000):
        np.testing.assert_array_equal(strata(levels, None), np.arange(levels + 1))
        for steps in (1, 2, 3, 10, 50, 333, 999, 1000, 5000):
            edges = strata(levels, steps)
            assert edges[0] == 0 and edges[-1] == levels and len(edges) == min(levels, steps) + 1
            assert np.diff(edges).min() >= 1
    widths = np.diff(strata(500, 50))
    assert (widths[:15] == 1).all() and widths[-1] == widths.max() > 20


def test_an_estimate_has_the_exact_bound_as_its_mean(loaded):
    joint = joint_of(loaded, Known, levels=40)
    exact = image_bounds(joint, grey(1), batch_size=64)
    found = image_bounds(joint, grey(256), 6, batch_size=64)
    # Each term is one of those of its stratum, and all of them occur.
    for k, (low, high) in enumerate(zip(found.edges[:-1], found.edges[1:], strict=True)):
        levels = np.abs(found.terms[:, k, None] - exact.terms[0, low:high]).argmin(axis=1)
        np.testing.assert_allclose(found.terms[:, k], exact.terms[0, low + levels], rtol=1e-3)
        assert set(levels) == set(range(high - low))
    bits = found.per_image
    assert abs(bits.mean() - exact.per_image[0]) < 3 * bits.std() / 16 < 0.1 * bits.mean()


def test_bounds_depend_on_seed_and_index_and_not_on_the_batch(loaded):
    joint = joint_of(loaded, Noisy)
    whole = image_bounds(joint, grey(10), 4, batch_size=10)
    parts = image_bounds(joint, grey(10), 4, batch_size=BATCH)  # the last one is padded
    np.testing.assert_allclose(parts.per_image, whole.per_image, rtol=1e-5)
    few = image_bounds(joint, grey(3), 4, batch_size=BATCH)
    np.testing.assert_allclose(few.per_image, whole.per_image[:3], rtol=1e-5)
    assert len(set(whole.per_image.round(4))) == 10  # equal images with noise of their own
    other = image_bounds(joint, grey(10), 4, seed=1, batch_size=BATCH)
    assert (np.abs(other.per_image - whole.per_image) > 1e-4).all()
    # Where a stratum is one level, the noise is that of the exact bound.
    exact = image_bounds(joint, grey(10), batch_size=BATCH)
    single = np.flatnonzero(np.diff(whole.edges) == 1)
    assert len(single) > 1
    np.testing.assert_allclose(
        whole.terms[:, single], exact.terms[:, whole.edges[single]], rtol=1e-5
    )


@pytest.fixture(scope="module")
def split():
    images, labels = load_split("digits", "test")
    return Split(images[:10], labels[:10], "test")


def test_the_evaluator_yields_means_over_the_images(loaded, split):
    """A real network; the steps are the default, which is fewer than its levels."""
    found = dict(evaluate(loaded, ["likelihood"], split, EvaluationOptions(BATCH)))
    bound = image_bounds(loaded, split.images, 50, batch_size=BATCH)
    bits, (label, _, t, lines) = bound.per_image, found["bound_by_t"]
    assert found["bits_per_dimension"] == pytest.approx(bits.mean())
    assert found["bits_per_dimension_error"] == pytest.approx(bits.std(ddof=1) / np.sqrt(10))
    assert label == "t" and t[0] == 0 and len(t) == 50 and t[-1] < 60
    (terms,) = lines.values()
    total = np.dot(terms, np.diff(bound.edges)) + found["bits_per_dimension_prior"]
    assert total == pytest.approx(found["bits_per_dimension"])


def test_wrong_values_are_refused(loaded, split):
    empty = Split(split.images[:0], split.labels[:0], "test")
    with pytest.raises(InvalidValue, match="^split='test' has no image$"):
        evaluated(loaded, empty)
    with pytest.raises(InvalidValue, match="^bound_steps=0 must be positive$"):
        evaluated(loaded, split, bound_steps=0)
    classifier = loaded.config.copy_and_resolve_references()
    classifier.loss.terms = ("classifier",)
    with pytest.raises(InvalidValue, match="was trained to classify alone$"):
        evaluated(dataclasses.replace(loaded, config=classifier), split)


def evaluated(joint, split, **options):
    return list(evaluate(joint, ["likelihood"], split, EvaluationOptions(BATCH, **options)))
