"""jdm.diffusion.samplers on data whose best noise estimate is known: a Gaussian at each pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.diffusion.process import Diffusion, Estimate
from jdm.diffusion.samplers import SAMPLERS, image_noise, sample, timesteps

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


def draw(eps_fn, diffusion, keys, shape=(2, 2, 1), options=None, **settings):
    """`sample`, compiled whole; options: the compiler's."""

    def whole(keys):
        return sample(eps_fn, diffusion, keys, shape, **settings)

    return np.asarray(jax.jit(whole, compiler_options=options)(keys))


noise_at = jax.jit(image_noise, static_argnums=2)


def gaussian_eps(diffusion: Diffusion):
    """E[eps | x_t] of that data, for the t the network is shown."""

    def eps_fn(x, t):
        abar = diffusion.at(diffusion.abar, t)
        variance = abar * DEVIATION**2 + 1 - abar
        return Estimate(jnp.sqrt(1 - abar) * (x - jnp.sqrt(abar) * MEAN) / variance)

    return eps_fn


def moments(case: str, total: int, steps: int, rows: int = 64, copies: int = 128):
    """Mean and deviation at each pixel over rows · copies draws (the channels are copies)."""
    name, eta, variance = CASES[case]
    diffusion = Diffusion(total, variance=variance)
    settings = dict(sampler=name, steps=steps, eta=eta, clip=False)
    if steps > 100:  # 33 million normal draws: worth optimising, unlike the rest of the tests
        settings["options"] = {"xla_backend_optimization_level": 1}
    images = draw(gaussian_eps(diffusion), diffusion, make_keys(rows), (2, 2, copies), **settings)
    return (f(images, axis=(0, 3))[..., None] for f in (np.mean, np.std))


@pytest.mark.parametrize("case", CASES)
def test_the_distribution_of_the_data_is_recovered(case):
    # 8192 draws at each pixel: the standard error is 1.1 % of the deviation for the mean, 0.8 % for
    # the deviation. 1000 steps leave an error of at most 1.0 % of the deviation (computed as in the
    # next test). Four standard errors of each, and that.
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
def test_few_steps_give_the_moments_of_the_short_chain(case, steps):
    # Here the steps' own error, up to tens of percent, is part of what is expected: what is left
    # are four standard errors of 8192 draws.
    mean, deviation = moments(case, 200, steps)
    expected_mean, expected_deviation = short_chain(case, 200, steps)
    np.testing.assert_allclose(mean, expected_mean, atol=0.045 * DEVIATION.max())
    np.testing.assert_allclose(deviation, expected_deviation, rtol=0.032)


# Times.


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_timesteps_run_strictly_down_from_the_last_time_to_zero(data):
    total = data.draw(st.integers(2, 4000))
    steps = data.draw(st.integers(2, total))
    times = timesteps(total, steps)
    assert times.dtype == np.int32 and len(times) == steps
    assert times[0] == total - 1 and times[-1] == 0
    assert np.all(np.diff(times) < 0)
    assert np.ptp(np.diff(times)) <= 1  # evenly


def test_one_step_starts_at_the_noisiest_time():
    assert timesteps(1000, 1).tolist() == [999]


def respaced(total: int, counts: list[int]) -> list[int]:
    """The published rule, a section after the other and a time after the other."""
    times, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        position = 0.0
        for _ in range(count):
            times.append(start + round(position))  # halves to even
            position += (size - 1) / (count - 1) if count > 1 else 1
        start += size
    return times


@pytest.mark.parametrize("total", [7, 24, 50, 100, 128, 500, 1000, 4000])
def test_timesteps_are_those_of_the_published_respacing(total):
    for steps in range(2, min(total, 300) + 1):  # 24 and 15: a half, rounded down as sums have it
        assert timesteps(total, steps)[::-1].tolist() == respaced(total, [steps])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_section_counts_are_those_of_the_published_respacing(data):
    sections = data.draw(st.integers(2, 6))
    total = data.draw(st.integers(sections, 2000))
    counts = data.draw(
        st.lists(st.integers(1, total // sections), min_size=sections, max_size=sections)
    )
    times = timesteps(total, ",".join(map(str, counts)))
    assert times.dtype == np.int32 and times[::-1].tolist() == respaced(total, counts)


def test_section_counts_by_hand():
    assert timesteps(12, "1,2,4").tolist() == [11, 10, 9, 8, 7, 4, 0]
    assert timesteps(10, "2,2,2").tolist() == [9, 7, 6, 4, 3, 0]  # the first section is longer
    assert timesteps(100, "20").tolist() == timesteps(100, 20).tolist()


@pytest.mark.parametrize(
    "steps, sentence",
    [
        ("10,60", r"^steps=10,60 asks for 60 of the 50 times of a section; .*steps=100$"),
        ("10,0", r"^steps=10,0 asks for 0 of the 50 times of a section"),
        ("10,", r"^steps=10, must be a whole number, or section counts such as 10,10,20$"),
        ("ddim50", r"^steps=ddim50 must be a whole number"),
        ("101", r"^steps=101 must lie between 1 and diffusion\.steps=100$"),
    ],
)
def test_section_counts_that_cannot_be_are_one_sentence(steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        timesteps(100, steps)


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_step_counts_that_cannot_be_are_an_error(steps):
    sentence = rf"^steps={steps} must lie between 1 and diffusion\.steps=100$"
    with pytest.raises(ValueError, match=sentence):
        timesteps(100, steps)
    diffusion = Diffusion(100)
    with pytest.raises(ValueError, match=sentence):
        sample(gaussian_eps(diffusion), diffusion, make_keys(1), (2, 2, 1), steps=steps)


def test_an_unknown_sampler_is_one_sentence_that_lists_the_known():
    diffusion = Diffusion(100)
    with pytest.raises(ValueError, match="^sampler='euler' is unknown; known: ancestral, ddim$"):
        sample(gaussian_eps(diffusion), diffusion, make_keys(1), (2, 2, 1), sampler="euler")


@pytest.mark.parametrize("name, steps", [*((name, 7) for name in SAMPLERS), ("ddim", "2,1,4")])
def test_the_network_sees_times_of_the_original_chain_and_no_others(name, steps):
    diffusion, seen = Diffusion(100), []

    def eps_fn(x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return gaussian_eps(diffusion)(x, t)

    draw(eps_fn, diffusion, make_keys(3), sampler=name, steps=steps)
    jax.effects_barrier()
    assert [t.tolist() for t in seen] == [[t] * 3 for t in timesteps(100, steps).tolist()]
    assert all(t.dtype == np.int32 for t in seen)


# Clipping.


@pytest.mark.parametrize("case", ["ddim noisy", "ancestral large"])
def test_clipped_images_stay_in_range_whatever_the_network_says(case):
    name, eta, variance = CASES[case]
    diffusion = Diffusion(100, variance=variance)
    estimates = []

    def wild(x, t):
        eps = 20 * jnp.sin(31 * x) + t[:, None, None, None]
        jax.debug.callback(estimates.append, diffusion.x0_from_eps(x, t, eps))
        return Estimate(eps)

    images = draw(wild, diffusion, make_keys(8), sampler=name, steps=10, eta=eta)
    assert np.abs(images).max() <= 1
    jax.effects_barrier()
    assert all(np.abs(x0).max() > 1 for x0 in estimates)


def test_noise_is_recomputed_from_the_clipped_image():
    """DDIM by hand, with a network that takes most of what it sees for noise."""
    diffusion, keys = Diffusion(100), make_keys(5)
    ours = draw(lambda x, t: Estimate(0.8 * x), diffusion, keys, steps=4)
    x = np.asarray(noise_at(keys, 100, (2, 2, 1)), np.float64)
    abar = diffusion.abar[[99, 66, 33, 0]]
    clipped = []
    for now, then in zip(abar, [*abar[1:], 1.0], strict=True):
        x0 = (x - np.sqrt(1 - now) * 0.8 * x) / np.sqrt(now)
        clipped.append((np.abs(x0) > 1).mean())
        x0 = np.clip(x0, -1, 1)
        eps = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then) * eps
    assert clipped[0] > 0.5 > clipped[-1]
    np.testing.assert_allclose(ours, x, atol=1e-4)


# Keys and noise.


def test_an_image_depends_on_its_own_key_alone():
    diffusion, keys = Diffusion(100), make_keys(6)
    eps_fn = gaussian_eps(diffusion)

    @jax.jit
    def images(keys):
        return sample(eps_fn, diffusion, keys, (2, 2, 3), sampler="ancestral", steps=5)

    every, order = images(keys), np.array([4, 0, 5, 2, 1, 3])
    assert len(np.unique(np.asarray(every).round(4), axis=0)) == 6
    np.testing.assert_array_equal(images(keys[order]), every[order])
    np.testing.assert_allclose(images(keys[2:4]), every[2:4], atol=1e-5)


def test_noise_is_standard_normal_and_new_at_every_index():
    keys = make_keys(4096)
    draws = np.stack([noise_at(keys, index, (2, 2, 1)).reshape(-1) for index in (0, 1, 1000)])
    np.testing.assert_allclose(draws.mean(axis=1), 0, atol=4 / 128)
    np.testing.assert_allclose(np.cov(draws), np.eye(3), atol=4 * np.sqrt(2) / 128)


def reverse_chain(diffusion: Diffusion, keys, eps_of, deviation_of) -> np.ndarray:
    """Ho et al. 2020, algorithm 2, as it is written there; noise from index t, x_T from T."""
    x = np.asarray(noise_at(keys, diffusion.steps, (2, 2, 1)), np.float64)
    for t in range(diffusion.steps - 1, -1, -1):
        beta, abar = diffusion.betas[t], diffusion.abar[t]
        x = (x - beta / np.sqrt(1 - abar) * eps_of(x, abar)) / np.sqrt(1 - beta)
        if t > 0:
            x = x + deviation_of(t) * np.asarray(noise_at(keys, t, (2, 2, 1)))
    return x


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_is_the_published_algorithm_with_new_noise_at_each_step(variance):
    diffusion, keys = Diffusion(30, variance=variance), make_keys(4)
    table = diffusion.posterior_variance if variance == "fixed_small" else diffusion.betas
    settings = dict(sampler="ancestral", steps=30, clip=False)
    ours = draw(lambda x, t: Estimate(0.5 * x), diffusion, keys, **settings)
    expected = reverse_chain(diffusion, keys, lambda x, abar: 0.5 * x, lambda t: table[t] ** 0.5)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_ancestral_takes_the_variance_that_was_learned():
    diffusion, keys = Diffusion(30, variance="learned"), make_keys(4)

    def eps_fn(x, t):  # half of the way from the mean of the two log variances to the upper
        return diffusion.estimate(jnp.concatenate([0.5 * x, jnp.full_like(x, 0.5)], axis=-1), x, t)

    def deviation_of(t):
        return diffusion.betas[t] ** (0.75 / 2) * diffusion.posterior_variance[t] ** (0.25 / 2)

    ours = draw(eps_fn, diffusion, keys, sampler="ancestral", steps=30, clip=False)
    expected = reverse_chain(diffusion, keys, lambda x, abar: 0.5 * x, deviation_of)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_learned_variance_of_nothing_leaves_the_chain_of_means():
    diffusion, keys = Diffusion(30, variance="learned"), make_keys(4)

    def eps_fn(x, t):
        return Estimate(0.5 * x, jnp.full_like(x, -40.0))

    ours = draw(eps_fn, diffusion, keys, sampler="ancestral", steps=30, clip=False)
    expected = reverse_chain(diffusion, keys, lambda x, abar: 0.5 * x, lambda t: 0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_learned_variance_samples_long_chains_without_nan():
    """At T = 4000 both ends of the learned variance are equal in float32 at the noisiest times."""
    diffusion = Diffusion(4000, variance="learned")

    def eps_fn(x, t):
        raw = jnp.concatenate([gaussian_eps(diffusion)(x, t).eps, 0.5 * x], axis=-1)
        return diffusion.estimate(raw, x, t)

    images = draw(eps_fn, diffusion, make_keys(2), sampler="ancestral", steps=30)
    assert np.isfinite(images).all()
