"""jdm.diffusion.process: the posterior, the variance of a reverse step, and the bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.diffusion.process import SCHEDULES, VARIANCES, Diffusion, Estimate, Level, pixels_to_float

LINEAR = Diffusion(1000)

# Compiled, which is faster here than operation by operation.
bound_of = jax.jit(Diffusion.bound, static_argnums=0)
estimate_of = jax.jit(Diffusion.estimate, static_argnums=0)
log_variance_of = jax.jit(Diffusion.log_variance, static_argnums=0)


def images(values) -> jnp.ndarray:
    """Numbers as images of one pixel [N, 1, 1, 1]."""
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def times(values) -> jnp.ndarray:
    return jnp.asarray(values, jnp.int32)


def noise(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The posterior.


def bayes(abar_s: float, abar_t: float, x0: float, xt: float) -> tuple[float, float]:
    """Mean and variance of q(x_s | x_t, x_0), by multiplying two densities on a grid."""
    ratio = abar_t / abar_s
    centre = np.sqrt(abar_s) * x0
    spread = np.sqrt(1 - abar_s)
    xs = np.linspace(centre - 12 * spread, centre + 12 * spread, 200_001)
    log_prior = -((xs - centre) ** 2) / (2 * (1 - abar_s))  # q(x_s | x_0)
    log_step = -((xt - np.sqrt(ratio) * xs) ** 2) / (2 * (1 - ratio))  # q(x_t | x_s)
    weight = np.exp(log_prior + log_step - (log_prior + log_step).max())
    weight /= weight.sum()
    mean = (weight * xs).sum()
    return mean, (weight * (xs - mean) ** 2).sum()


@pytest.mark.parametrize("t, s", [(1, 0), (5, 4), (24, 23), (24, 0), (12, 5)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_that_of_bayes(name, t, s):
    diffusion = Diffusion(25, name)
    abar_t, abar_s = diffusion.abar[t], diffusion.abar[s]
    x0, xt = 0.7, -0.4
    mean, variance = bayes(abar_s, abar_t, x0, xt)

    levels = Level.of(abar_t), Level.of(abar_s)
    ours = diffusion.posterior_mean(images(x0), images(xt), *levels)
    np.testing.assert_allclose(ours.item(), mean, rtol=1e-4)
    small = dataclasses.replace(diffusion, variance="fixed_small")
    log_variance = log_variance_of(small, Estimate(images(0)), times([t]), *levels)
    np.testing.assert_allclose(log_variance.item(), np.log(variance), atol=1e-3)
    if s == t - 1:
        np.testing.assert_allclose(diffusion.posterior_variance[t], variance, rtol=1e-6)


def test_posterior_of_the_clean_image_is_the_clean_image():
    levels = Level.of(0.4), Level.of(1.0)
    mean = LINEAR.posterior_mean(images([0.3, -1]), images([2, 5]), *levels)
    np.testing.assert_allclose(mean, images([0.3, -1]), rtol=1e-6)
    assert LINEAR.posterior_variance[0] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_accurate_near_the_image_and_near_the_noise(name):
    """At t = 0 of "cosine" 1 - abar is 4e-5, which a float32 of abar resolves to 0.1 % only."""
    diffusion = Diffusion(500, schedule=name)
    t = jnp.asarray([1, 2, 5, 20, 250, 498, 499])
    abar_s, abar_t = diffusion.abar[t - 1], diffusion.abar[t]
    of_x0 = np.sqrt(abar_s) * diffusion.betas[t] / (1 - abar_t)
    of_xt = np.sqrt(1 - diffusion.betas[t]) * (1 - abar_s) / (1 - abar_t)
    one, none = jnp.ones((7, 1, 1, 1)), jnp.zeros((7, 1, 1, 1))
    for expected, x0, xt in ((of_x0, one, none), (of_xt, none, one)):
        ours = diffusion.posterior_mean(x0, xt, *diffusion.levels(t))
        np.testing.assert_allclose(ours[:, 0, 0, 0], expected, rtol=1e-5)


def test_log_variances_begin_with_the_posterior_at_one():
    first = np.log(LINEAR.posterior_variance[1])
    np.testing.assert_allclose(
        LINEAR.small_log_variance, [first, *np.log(LINEAR.posterior_variance[1:])]
    )
    np.testing.assert_allclose(LINEAR.large_log_variance, [first, *np.log(LINEAR.betas[1:])])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_previous_image_is_predicted_as_the_mean_of_the_posterior(name):
    diffusion = dataclasses.replace(Diffusion(25, name), prediction="previous")
    x0, eps = 0.7, -1.2
    for t in (1, 5, 24):
        abar_t, abar_s = diffusion.abar[t], diffusion.abar[t - 1]
        xt = np.sqrt(abar_t) * x0 + np.sqrt(1 - abar_t) * eps
        expected, _ = bayes(abar_s, abar_t, x0, xt)
        target = diffusion.target(images(x0), times([t]), images(eps))
        np.testing.assert_allclose(target.item(), expected, rtol=1e-4, atol=1e-4)
    # At t = 0 the previous image is the clean one.
    np.testing.assert_array_equal(diffusion.target(images(x0), times([0]), images(eps)), images(x0))


@pytest.mark.parametrize("steps", [25, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_predicted_previous_image_is_the_mean_of_the_reverse_step(name, steps):
    """For any raw output, also at the noisy end, where it determines x0 poorly."""
    diffusion = dataclasses.replace(Diffusion(steps, name), prediction="previous")
    t = jnp.arange(steps)
    raw, xt = noise(0, steps, 1, 1, 1), noise(1, steps, 1, 1, 1)
    x0 = diffusion.x0_from_eps(xt, t, estimate_of(diffusion, raw, xt, t).eps)
    mean = diffusion.posterior_mean(x0, xt, *diffusion.levels(t))
    np.testing.assert_allclose(mean, raw, atol=2e-3)


# Learned variance.


@pytest.fixture(scope="module")
def learned() -> Diffusion:
    return Diffusion(100, variance="learned")


def test_learned_variance_interpolates_the_two_log_variances(learned):
    t = jnp.arange(100)
    mean = noise(0, 100, 1, 1, 2)
    ends = {-1.0: learned.small_log_variance, 1.0: np.log(learned.betas)}
    ends[0.0] = (ends[-1.0] + ends[1.0]) / 2
    for value, expected in ends.items():
        raw = jnp.concatenate([mean, jnp.full_like(mean, value)], axis=-1)
        estimate = estimate_of(learned, raw, jnp.zeros_like(mean), t)
        np.testing.assert_array_equal(estimate.eps, mean)
        assert estimate.log_variance.shape == mean.shape
        np.testing.assert_allclose(estimate.log_variance[:, 0, 0, 0], expected, rtol=1e-5)


def test_fixed_variance_leaves_the_output_whole():
    raw = noise(0, 2, 2, 2, 2)
    mean, variance = LINEAR.split(raw)
    assert variance is None
    np.testing.assert_array_equal(mean, raw)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_of_a_step_to_the_neighbour_is_the_table(name, variance):
    diffusion = Diffusion(100, schedule=name, variance=variance)
    t = jnp.arange(1, 100)
    table = diffusion.small_log_variance if "small" in variance else diffusion.large_log_variance
    estimate = Estimate(jnp.zeros((99, 1, 1, 1)))
    ours = log_variance_of(diffusion, estimate, t, *diffusion.levels(t))
    np.testing.assert_allclose(ours[:, 0, 0, 0], table[1:], atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [100, 4000])
def test_learned_variance_of_a_step_to_the_neighbour_is_the_networks(name, steps):
    """Also at the noisy end, where the two log variances are equal in float32."""
    diffusion = Diffusion(steps, schedule=name, variance="learned")
    t = jnp.arange(1, steps)
    value = noise(0, steps - 1, 1, 1, 1)
    raw = jnp.concatenate([jnp.zeros_like(value), value], axis=-1)
    estimate = estimate_of(diffusion, raw, jnp.zeros_like(value), t)
    ours = log_variance_of(diffusion, estimate, t, *diffusion.levels(t))
    np.testing.assert_allclose(ours, estimate.log_variance, atol=2e-2)


def test_learned_variance_keeps_its_fraction_over_longer_steps(learned):
    t = times([99, 50, 10])
    at_t, at_s = (learned.levels(q)[0] for q in (t, times([49, 10, 2])))
    value = images([-1.0, 0.5, 1.0])
    raw = jnp.concatenate([jnp.zeros_like(value), value], axis=-1)
    ours = log_variance_of(learned, estimate_of(learned, raw, value, t), t, at_t, at_s)
    abar_t, abar_s = np.float64(at_t.abar), np.float64(at_s.abar)
    beta = 1 - abar_t / abar_s
    low, high = np.log(beta * (1 - abar_s) / (1 - abar_t)), np.log(beta)
    np.testing.assert_allclose(ours, low + (value + 1) / 2 * (high - low), atol=2e-3)


# The bound.


def kl_of_gaussians(mean, variance, other_mean, other_variance) -> float:
    """KL(N || other N) in nats, by summing over a grid."""
    x = mean + np.sqrt(variance) * np.linspace(-12, 12, 20_001)
    log_p = -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    log_q = -0.5 * ((x - other_mean) ** 2 / other_variance + np.log(2 * np.pi * other_variance))
    return (np.exp(log_p) * (log_p - log_q)).sum() * (x[1] - x[0])


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_is_the_divergence_of_the_two_reverse_steps(variance):
    diffusion = Diffusion(25, variance=variance)
    t = 12
    x0, eps, wrong = images([0.6, -0.9]), images([0.3, -1.1]), images([0.5, -1.4])
    xt = diffusion.q_sample(x0, times([t, t]), eps)
    log_variance = images([-3.0, -2.0]) if variance == "learned" else None
    ours = bound_of(diffusion, Estimate(wrong, log_variance), x0, xt, times([t, t]))
    table = diffusion.large_log_variance if "large" in variance else diffusion.small_log_variance
    abar_t, abar_s = diffusion.abar[t], diffusion.abar[t - 1]
    for i in range(2):
        mean, true_variance = bayes(abar_s, abar_t, x0[i].item(), xt[i].item())
        x0_wrong = (xt[i] - np.sqrt(1 - abar_t) * wrong[i]).item() / np.sqrt(abar_t)
        wrong_mean, _ = bayes(abar_s, abar_t, x0_wrong, xt[i].item())
        its_variance = np.exp(table[t] if log_variance is None else log_variance[i].item())
        nats = kl_of_gaussians(mean, true_variance, wrong_mean, its_variance)
        np.testing.assert_allclose(ours[i], nats / np.log(2), rtol=1e-3)


def test_bound_of_the_truth_is_zero():
    diffusion = Diffusion(100, variance="fixed_small")
    t = jnp.arange(1, 100)
    x0, eps = noise(0, 99, 2, 2, 1), noise(1, 99, 2, 2, 1)
    xt = diffusion.q_sample(x0, t, eps)
    np.testing.assert_allclose(
        bound_of(diffusion, Estimate(eps), x0, xt, t), np.zeros(99), atol=1e-5
    )
    assert (bound_of(diffusion, Estimate(eps + 0.1), x0, xt, t) > 1e-4).all()


def test_terms_of_the_bound_add_up_to_the_divergence_of_whole_chains():
    """For N(m, v) data and its best eps, the chain x_0 <- ... <- x_T-1 is one big Gaussian.

    KL(q(x_1..x_T-1 | x_0) || p(x_1..x_T-1)) over that chain, from two covariance matrices, is the
    sum of the terms for t > 0 and of KL(q(x_T-1 | x_0) || N(0, 1)). Each term is quadratic in the
    noise, so its mean is exact from the two points eps = -1 and 1. (x_t is named by its index.)
    """
    diffusion = Diffusion(30, variance="fixed_large")
    last, x0, m, v = 29, 0.8, -0.2, 0.3
    abar, beta = diffusion.abar, diffusion.betas

    def best_eps(xt, abar):
        return np.sqrt(1 - abar) * (xt - np.sqrt(abar) * m) / (abar * v + 1 - abar)

    t = np.repeat(np.arange(1, 30), 2)
    xt = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * np.tile([-1.0, 1.0], 29)
    estimate = Estimate(images(best_eps(xt, abar[t])))
    terms = bound_of(diffusion, estimate, images(np.full(58, x0)), images(xt), times(t))
    prior = kl_of_gaussians(np.sqrt(abar[last]) * x0, 1 - abar[last], 0.0, 1.0)
    ours = np.asarray(terms).reshape(29, 2).mean(axis=1).sum() * np.log(2) + prior

    # q: x_i = sqrt(abar_i) x0 + noise that is shared from the smaller index on.
    i, j = np.meshgrid(np.arange(30), np.arange(30), indexing="ij")
    low, high = np.minimum(i, j), np.maximum(i, j)
    q_mean, q_cov = np.sqrt(abar) * x0, np.sqrt(abar[high] / abar[low]) * (1 - abar[low])
    # p: backwards from N(0, 1); every step is linear in x, found from its values at 0 and 1.
    p_mean, p_cov = np.zeros(30), np.zeros((30, 30))
    p_cov[last, last] = 1
    for k in range(last, 0, -1):
        steps = []
        for x in (0.0, 1.0):
            x0_hat = (x - np.sqrt(1 - abar[k]) * best_eps(x, abar[k])) / np.sqrt(abar[k])
            steps.append(bayes(abar[k - 1], abar[k], x0_hat, x)[0])
        slope = steps[1] - steps[0]
        p_mean[k - 1] = steps[0] + slope * p_mean[k]
        p_cov[k - 1, k:] = p_cov[k:, k - 1] = slope * p_cov[k, k:]
        p_cov[k - 1, k - 1] = slope**2 * p_cov[k, k] + beta[k]
    inverse, shift = np.linalg.inv(p_cov), p_mean - q_mean
    log_ratio = np.linalg.slogdet(p_cov)[1] - np.linalg.slogdet(q_cov)[1]
    whole = 0.5 * (np.trace(inverse @ q_cov) + shift @ inverse @ shift - 30 + log_ratio)
    np.testing.assert_allclose(ours, whole, rtol=1e-3)


@pytest.mark.parametrize("eps", [-1.5, 0.0, 2.0])
def test_decoder_probabilities_of_the_256_pixel_values_sum_to_1(eps):
    every = pixels_to_float(jnp.arange(256, dtype=jnp.uint8).reshape(-1, 1, 1, 1))
    t, xt = jnp.zeros(256, jnp.int32), jnp.full(every.shape, 0.97)
    bits = bound_of(LINEAR, Estimate(jnp.full(every.shape, eps)), every, xt, t)
    mass = 2.0 ** -np.asarray(bits, np.float64)
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-4)
    a, b = np.sqrt(LINEAR.abar[0]), np.sqrt(1 - LINEAR.abar[0])
    expected = np.clip((0.97 - b * eps) / a, -1, 1)  # the decoder's mean; the ends are open
    assert abs(every[mass.argmax()].item() - expected) <= 1 / 255 + 1e-6


def test_decoder_gives_dark_and_bright_pixels_the_same_likelihoods():
    """Mirrored images have mirrored likelihoods, also six deviations from the mean."""
    deviation = np.exp(0.5 * LINEAR.large_log_variance[0])
    x0 = images(np.round(deviation * np.linspace(-6, 6, 25) * 127.5) / 127.5)
    t, xt = jnp.zeros(25, jnp.int32), jnp.zeros_like(x0)
    bits = bound_of(LINEAR, Estimate(xt), x0, xt, t)
    np.testing.assert_allclose(bits, bits[::-1], rtol=1e-3)
