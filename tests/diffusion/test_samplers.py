"""jdm.diffusion.samplers on data whose best noise estimate is known: a Gaussian at each pixel.

Orders of convergence are tested in test_sampler_order.py, times in test_times.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, Estimate
from jdm.diffusion.samplers import (
    SAMPLERS,
    THRESHOLDS,
    image_noise,
    initial_noise,
    reverse,
    timesteps,
)

# Mean and deviation of the data at each of four pixels [2, 2, 1].
MEAN = np.array([-0.5, 0.3, 0.8, 0.0]).reshape(2, 2, 1)
DEVIATION = np.array([0.6, 0.8, 1.0, 1.5]).reshape(2, 2, 1)

# name of the test case -> (sampler, eta, variance)
CASES = {
    "ddim": ("ddim", 0.0, "fixed_large"),
    "ddim noisy": ("ddim", 1.0, "fixed_large"),
    "ancestral small": ("ancestral", 0.0, "fixed_small"),
    "ancestral large": ("ancestral", 0.0, "fixed_large"),
}


def make_keys(n: int):
    return jax.vmap(jax.random.key)(np.arange(n))


def walk(eps_fn, diffusion, start, steps, trajectory=False, **options):
    """`reverse` from start, compiled."""
    method = Method(**dict(sampler="ddim", threshold="static") | options)
    times, keys = timesteps(diffusion, steps), make_keys(len(start))

    @jax.jit
    def run(x):
        return reverse(eps_fn, diffusion, x, keys, times, method, trajectory)

    return run(start)


noise_at = jax.jit(image_noise, static_argnums=2)


def gaussian_eps(diffusion: Diffusion):
    """E[eps | x_t] of that data, at the t that the sampler passes."""

    def eps_fn(x, t):
        abar = diffusion.at(diffusion.abar, t)
        variance = abar * DEVIATION**2 + 1 - abar
        return Estimate(jnp.sqrt(1 - abar) * (x - jnp.sqrt(abar) * MEAN) / variance)

    return eps_fn


@pytest.fixture
def moments(draw):
    """moments(case, total, steps) -> mean and deviation at each pixel over 8192 draws, which are
    64 rows of 128 channels."""

    def moments(case: str, total: int, steps: int):
        name, eta, variance = CASES[case]
        diffusion = Diffusion(total, variance=variance)
        options = dict(sampler=name, steps=steps, eta=eta, threshold="none", optimise=steps > 100)
        images = draw(gaussian_eps(diffusion), diffusion, make_keys(64), (2, 2, 128), **options)
        return (f(images, axis=(0, 3))[..., None] for f in (np.mean, np.std))

    return moments


@pytest.mark.parametrize("case", CASES)
def test_the_distribution_of_the_data_is_recovered(moments, case):
    # 8192 draws at each pixel: the standard error is 1.1 % of the deviation for the mean, 0.8 % for
    # the deviation. 1000 steps leave an error of at most 1.0 % of the deviation (computed as in the
    # next test). The tolerances are four standard errors and this.
    mean, deviation = moments(case, 1000, 1000)
    np.testing.assert_allclose(mean / DEVIATION, MEAN / DEVIATION, atol=0.055)
    np.testing.assert_allclose(deviation / DEVIATION, 1, atol=0.042)


def short_chain(case: str, total: int, steps: int):
    """The same moments in closed form: every step is affine in x and adds known noise."""
    name, eta, variance = CASES[case]
    abar = Diffusion(total).abar[np.linspace(total - 1, 0, steps).round().astype(int)]
    mean, spread = np.zeros_like(MEAN), np.ones_like(MEAN)
    for now, then in zip(abar, [*abar[1:], 1.0], strict=True):
        variance_t = now * DEVIATION**2 + 1 - now
        # x0 = keep x + pull, eps = slope (x - sqrt(now) MEAN)
        keep, pull = np.sqrt(now) * DEVIATION**2 / variance_t, (1 - now) * MEAN / variance_t
        slope = np.sqrt(1 - now) / variance_t
        posterior = (1 - now / then) * (1 - then) / (1 - now)
        if name == "ddim":
            added = eta**2 * posterior
            toward = np.sqrt(1 - then - added)
            gain = np.sqrt(then) * keep + toward * slope
            shift = np.sqrt(then) * pull - toward * slope * np.sqrt(now) * MEAN
        else:
            # The posterior's mean, by its precisions: one from x_0, one from x_t.
            from_x0, from_xt = (
                (1 / (1 - then), now / then / (1 - now / then)) if then < 1 else (1, 0)
            )
            weight = from_x0 + from_xt
            to_x = from_xt * np.sqrt(then / now) / weight
            to_x0 = from_x0 * np.sqrt(then) / weight
            gain, shift = to_x0 * keep + to_x, to_x0 * pull
            added = (posterior if variance == "fixed_small" else 1 - now / then) * (then < 1)
        mean, spread = gain * mean + shift, gain**2 * spread + added
    return mean, np.sqrt(spread)


@pytest.mark.parametrize("case, steps", [*((case, 12) for case in CASES), ("ddim", 1)])
def test_few_steps_give_the_moments_of_the_short_chain(moments, case, steps):
    # The expected moments include the discretisation error of the steps, tens of percent. The
    # tolerances are four standard errors of 8192 draws.
    mean, deviation = moments(case, 200, steps)
    expected_mean, expected_deviation = short_chain(case, 200, steps)
    np.testing.assert_allclose(mean, expected_mean, atol=0.045 * DEVIATION.max())
    np.testing.assert_allclose(deviation, expected_deviation, rtol=0.032)


@pytest.mark.parametrize(
    "name, steps, error", [("ddim", 100, 0.06), ("dpmpp_2m", 100, 0.005), ("heun", 50, 0.0008)]
)
def test_deterministic_samplers_take_each_image_where_the_exact_flow_does(name, steps, error):
    # Along the flow a pixel keeps its distance from the mean, in deviations. error: the largest
    # error of these steps in float64 (0.047, 0.0036, 0.00061), and a quarter more.
    diffusion = Diffusion(1000, schedule="cosine")
    start, abar = jax.random.normal(jax.random.key(0), (64, 2, 2, 1)), diffusion.abar[-1]
    wide = np.sqrt(abar * DEVIATION**2 + 1 - abar)
    expected = MEAN + (np.asarray(start) - np.sqrt(abar) * MEAN) / wide * DEVIATION
    ours = walk(gaussian_eps(diffusion), diffusion, start, steps, sampler=name, threshold="none")
    np.testing.assert_allclose(ours[0], expected, atol=error)


# Calls of the network, and the trajectory.


def watched(eps_fn, seen: list):
    """eps_fn, which also appends (x, t) of every call to `seen`."""

    def watch(x, t):
        jax.debug.callback(lambda *at: seen.append([*map(jnp.asarray, at)]), x, t, ordered=True)
        return eps_fn(x, t)

    return watch


@pytest.mark.parametrize("name, steps", [*((name, 7) for name in SAMPLERS), ("ddim", "2,1,4")])
def test_the_network_sees_times_of_the_original_chain_and_no_others(draw, name, steps):
    diffusion, seen = Diffusion(100), []
    draw(watched(gaussian_eps(diffusion), seen), diffusion, make_keys(3), sampler=name, steps=steps)
    jax.effects_barrier()
    times = timesteps(diffusion, steps).tolist()
    if SAMPLERS[name].evaluations == 2:  # t0, t1, t1, t2, t2, ...: predicted, then corrected
        times = [times[0], *(t for t in times[1:] for _ in range(2))]
    assert [t.tolist() for _, t in seen] == [[t] * 3 for t in times]
    assert all(t.dtype == np.int32 for _, t in seen)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_trajectory_is_the_estimate_at_each_time_and_ends_with_the_image(name, steps):
    # Few levels: the noisiest of 100 has sqrt(abar) = 1 / 280, which magnifies rounding in eps.
    diffusion, seen = Diffusion(8), []
    eps_fn, start = gaussian_eps(diffusion), jax.random.normal(jax.random.key(1), (3, 2, 2, 1))
    image, trajectory = walk(watched(eps_fn, seen), diffusion, start, steps, True, sampler=name)
    jax.effects_barrier()
    assert trajectory.shape == (steps, 3, 2, 2, 1)
    np.testing.assert_array_equal(trajectory[-1], image)
    corrected = seen[:: SAMPLERS[name].evaluations]  # without the predictor's x
    estimates = [diffusion.x0_from_eps(x, t, eps_fn(x, t).eps) for x, t in corrected]
    np.testing.assert_allclose(trajectory, np.clip(estimates, -1, 1), atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_estimate_at_the_noisiest_time(name):
    diffusion, eps_fn = Diffusion(100), gaussian_eps(Diffusion(100))
    start, t = jax.random.normal(jax.random.key(2), (3, 2, 2, 1)), jnp.full(3, 99)
    image, trajectory = walk(eps_fn, diffusion, start, 1, sampler=name, threshold="none")
    expected = diffusion.x0_from_eps(start, t, eps_fn(start, t).eps)
    assert trajectory is None
    np.testing.assert_allclose(image, expected, atol=1e-4)  # 1 / sqrt(abar) is 280 there


@pytest.mark.parametrize("total, steps", [(1, 1), (2, 2), (4000, 3)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_images_and_their_derivatives_are_finite_at_both_ends(name, total, steps):
    """At T = 4000 the noisiest abar of "cosine" is 1e-10; the clean image's log SNR is infinite."""
    diffusion, keys = Diffusion(total, schedule="cosine"), make_keys(3)
    eps_fn, times = gaussian_eps(diffusion), timesteps(diffusion, steps)
    method = Method(sampler=name, threshold="none")

    @jax.jit
    @jax.value_and_grad
    def images(x):
        image, _ = reverse(eps_fn, diffusion, x, keys, times, method)
        return (image**2).sum()

    chex.assert_tree_all_finite(images(jax.random.normal(jax.random.key(3), (3, 2, 2, 1))))


# Thresholds.


@pytest.mark.parametrize("threshold", ["static", "dynamic"])
@pytest.mark.parametrize("name, eta", [(name, float(name == "ddim")) for name in SAMPLERS])
def test_thresholded_images_stay_in_range_for_any_network(draw, name, eta, threshold):
    diffusion, seen = Diffusion(100), []

    def wild(x, t):
        return Estimate(20 * jnp.sin(31 * x) + t[:, None, None, None])

    options = dict(sampler=name, steps=10, eta=eta, threshold=threshold)
    images = draw(watched(wild, seen), diffusion, make_keys(8), **options)
    assert np.abs(images).max() <= 1
    jax.effects_barrier()
    assert all(np.abs(diffusion.x0_from_eps(x, t, wild(x, t).eps)).max() > 1 for x, t in seen)


PIXELS = st.floats(-1, 1, width=32, allow_subnormal=False)  # XLA flushes those to 0


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, (4, 6, 6, 3), elements=PIXELS),
    hnp.arrays(np.float32, (4, 1, 1, 1), elements=st.floats(1, 50, width=32)),
)
def test_dynamic_scales_each_image_that_leaves_the_range_by_itself(images, scales):
    images = images * scales
    clipped = np.asarray(dynamic(jnp.asarray(images)))
    assert np.abs(clipped).max(initial=0) <= 1
    for before, after in zip(images, clipped, strict=True):
        most = np.quantile(np.abs(before), 0.995)
        if np.abs(before).max() <= 1:
            np.testing.assert_allclose(after, before, atol=1e-6)
        elif most <= 1:  # too few pixels are out of range to rescale: these are clipped
            np.testing.assert_allclose(after, before.clip(-1, 1), atol=1e-6)
        else:
            np.testing.assert_allclose(after, (before / most).clip(-1, 1), atol=1e-5)


dynamic = jax.jit(THRESHOLDS["dynamic"])


def test_an_estimate_of_another_shape_is_an_error_and_not_broadcast():
    diffusion = Diffusion(steps=20, schedule="cosine", prediction="eps", variance="fixed_small")
    with pytest.raises(AssertionError, match="shape"):
        walk(lambda x, t: Estimate(x[:, :1, :1]), diffusion, jnp.zeros((2, 4, 4, 1)), 5)


def test_static_clips():
    images = jnp.linspace(-3, 3, 12).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(THRESHOLDS["static"](images), images.clip(-1, 1))


@pytest.mark.parametrize("threshold", ["static", "dynamic"])
def test_noise_is_recomputed_from_the_thresholded_image(draw, threshold):
    """DDIM by hand, with a network that estimates 80 % of its input to be noise."""
    diffusion, keys = Diffusion(100), make_keys(5)
    ours = draw(lambda x, t: Estimate(0.8 * x), diffusion, keys, steps=4, threshold=threshold)
    x = np.asarray(noise_at(keys, 100, (2, 2, 1)), np.float64)
    abar = diffusion.abar[[99, 66, 33, 0]]
    changed = []
    for now, then in zip(abar, [*abar[1:], 1.0], strict=True):
        x0 = (x - np.sqrt(1 - now) * 0.8 * x) / np.sqrt(now)
        changed.append((np.abs(x0) > 1).mean())
        most = np.quantile(np.abs(x0), 0.995, axis=(1, 2, 3), keepdims=True).clip(1)
        x0 = (x0 / most if threshold == "dynamic" else x0).clip(-1, 1)
        eps = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then) * eps
    assert changed[0] > 0.5 > changed[-1]
    np.testing.assert_allclose(ours, x, atol=1e-4)


# Keys and noise.


@pytest.mark.parametrize("name, eta", [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)])
def test_an_image_depends_on_its_own_key_alone(name, eta):
    """And on the key of x_T alone, where the record says that the sampler draws no noise."""
    diffusion, keys = Diffusion(100), make_keys(6)
    method = Method(sampler=name, eta=eta, threshold="static")
    eps_fn, times = gaussian_eps(diffusion), timesteps(diffusion, 5)

    @jax.jit
    def images(keys, step_keys):
        start = initial_noise(diffusion, keys, (2, 2, 3))
        return reverse(eps_fn, diffusion, start, step_keys, times, method)[0]

    every, order = images(keys, keys), np.array([4, 0, 5, 2, 1, 3])
    assert len(np.unique(np.asarray(every).round(4), axis=0)) == 6
    np.testing.assert_array_equal(images(keys[order], keys[order]), every[order])
    np.testing.assert_allclose(images(keys[2:4], keys[2:4]), every[2:4], atol=1e-5)
    changed = np.abs(images(keys, keys[order]) - every).max() > 1e-3
    assert changed == SAMPLERS[name].draws_noise(method)


def test_noise_is_standard_normal_and_new_at_every_index():
    keys = make_keys(4096)
    draws = np.stack([noise_at(keys, index, (2, 2, 1)).reshape(-1) for index in (0, 1, 1000)])
    np.testing.assert_allclose(draws.mean(axis=1), 0, atol=4 / 128)
    np.testing.assert_allclose(np.cov(draws), np.eye(3), atol=4 * np.sqrt(2) / 128)


def reverse_chain(diffusion: Diffusion, keys, eps_of, deviation_of) -> np.ndarray:
    """Ho et al. 2020, algorithm 2, as in the paper; noise from index t, x_T from index T."""
    x = np.asarray(noise_at(keys, diffusion.steps, (2, 2, 1)), np.float64)
    for t in range(diffusion.steps - 1, -1, -1):
        beta, abar = diffusion.betas[t], diffusion.abar[t]
        x = (x - beta / np.sqrt(1 - abar) * eps_of(x, abar)) / np.sqrt(1 - beta)
        if t > 0:
            x = x + deviation_of(t) * np.asarray(noise_at(keys, t, (2, 2, 1)))
    return x


@pytest.mark.parametrize(
    "variance, s_noise", [("fixed_small", 1.0), ("fixed_large", 1.0), ("fixed_large", 1.3)]
)
def test_ancestral_is_the_published_algorithm_with_new_noise_at_each_step(draw, variance, s_noise):
    diffusion, keys = Diffusion(30, variance=variance), make_keys(4)
    table = diffusion.posterior_variance if variance == "fixed_small" else diffusion.betas
    options = dict(sampler="ancestral", steps=30, threshold="none", s_noise=s_noise)
    ours = draw(lambda x, t: Estimate(0.5 * x), diffusion, keys, **options)
    deviation = s_noise * np.sqrt(table)
    expected = reverse_chain(diffusion, keys, lambda x, abar: 0.5 * x, lambda t: deviation[t])
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_ancestral_uses_a_learned_variance(draw):
    diffusion, keys = Diffusion(30, variance="learned"), make_keys(4)

    def eps_fn(x, t):  # the log variance at three quarters between the two
        return diffusion.estimate(jnp.concatenate([0.5 * x, jnp.full_like(x, 0.5)], axis=-1), x, t)

    def deviation_of(t):
        return diffusion.betas[t] ** (0.75 / 2) * diffusion.posterior_variance[t] ** (0.25 / 2)

    ours = draw(eps_fn, diffusion, keys, sampler="ancestral", steps=30, threshold="none")
    expected = reverse_chain(diffusion, keys, lambda x, abar: 0.5 * x, deviation_of)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_learned_variance_of_0_leaves_the_chain_of_means(draw):
    diffusion, keys = Diffusion(30, variance="learned"), make_keys(4)

    def eps_fn(x, t):
        return Estimate(0.5 * x, jnp.full_like(x, -40.0))

    ours = draw(eps_fn, diffusion, keys, sampler="ancestral", steps=30, threshold="none")
    expected = reverse_chain(diffusion, keys, lambda x, abar: 0.5 * x, lambda t: 0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_learned_variance_samples_long_chains_without_nan(draw):
    """At T = 4000 the two log variances of (4) are equal in float32 at the noisiest times."""
    diffusion = Diffusion(4000, variance="learned")

    def eps_fn(x, t):
        raw = jnp.concatenate([gaussian_eps(diffusion)(x, t).eps, 0.5 * x], axis=-1)
        return diffusion.estimate(raw, x, t)

    images = draw(eps_fn, diffusion, make_keys(2), sampler="ancestral", steps=30)
    assert np.isfinite(images).all()
