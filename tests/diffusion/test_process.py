"""jdm.diffusion.process: schedules, conversions, weights and pixels, against closed forms.

The posterior, the reverse step and the bound are tested in test_reverse_step.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm.diffusion.method import Method
from jdm.diffusion.process import (
    PREDICTIONS,
    SCHEDULES,
    VARIANCES,
    Diffusion,
    float_to_pixels,
    pixels_to_float,
)
from jdm.diffusion.samplers import initial_noise, reverse, timesteps
from jdm.errors import InvalidValue

DIFFUSIONS = {
    (name, steps): Diffusion(steps, schedule=name) for name in SCHEDULES for steps in (25, 1000)
}
LINEAR = DIFFUSIONS["linear", 1000]

# Compiled whole, which is faster here than operation by operation.
estimate_of = jax.jit(Diffusion.estimate, static_argnums=0)
x0_of = jax.jit(Diffusion.x0_of, static_argnums=0)


def images(values) -> jnp.ndarray:
    """Numbers as images of one pixel [N, 1, 1, 1]."""
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def times(values) -> jnp.ndarray:
    return jnp.asarray(values, jnp.int32)


def noise(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Schedules.


@pytest.mark.parametrize(
    "name, steps, first, last",
    [
        ("linear", 1000, 0.001, 0.02),
        ("linear", 500, 0.002, 0.04),
        ("linear_ddpm", 1000, 0.0001, 0.02),
        ("linear_ddpm", 250, 0.0004, 0.08),
        # Another rule below ten steps: from 0.01 s to 0.02 s, s = 100 / T.
        ("linear", 9, 0.01 * 100 / 9, 0.02 * 100 / 9),
        ("linear", 3, 1 / 3, 2 / 3),
    ],
)
def test_linear_betas_rise_evenly_between_their_ends(name, steps, first, last):
    diffusion = Diffusion(steps, schedule=name)
    expected = [first + (last - first) * i / (steps - 1) for i in range(steps)]
    np.testing.assert_allclose(diffusion.betas, expected, rtol=1e-12)
    product, abar = 1.0, []
    for beta in expected:
        product *= 1 - beta
        abar.append(product)
    np.testing.assert_allclose(diffusion.abar, abar, rtol=1e-10)


@pytest.mark.parametrize("steps", [25, 1000])
def test_cosine_abar_is_the_squared_cosine_until_betas_are_cut(steps):
    diffusion = Diffusion(steps, schedule="cosine")
    u = np.arange(steps + 1) / steps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(diffusion.abar[:-1], (f / f[0])[1:-1], rtol=1e-9)
    assert diffusion.betas[-1] == 0.999


@pytest.mark.parametrize("diffusion", DIFFUSIONS.values(), ids=map(str, DIFFUSIONS))
def test_every_schedule_falls_from_nearly_clean_to_noise(diffusion):
    assert len(diffusion.betas) == diffusion.steps
    assert diffusion.betas.dtype == diffusion.abar.dtype == np.float64
    assert np.all(np.diff(diffusion.abar) < 0)
    assert diffusion.abar[0] > 0.95
    assert 0 < diffusion.abar[-1] < 1e-4


@pytest.mark.parametrize("name", ["linear", "linear_ddpm"])
@pytest.mark.parametrize("steps", [2, 10, 15, 20])
def test_betas_that_reach_one_are_an_error_that_names_the_key(name, steps):
    with pytest.raises(InvalidValue, match=rf"^config\.diffusion\.steps={steps} .*{name}"):
        Diffusion(steps, schedule=name)


def test_the_neighbours_of_the_forbidden_step_counts_are_allowed():
    assert Diffusion(9).betas[-1] < 1 and Diffusion(21).betas[-1] < 1


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_an_error_that_names_the_key(steps):
    with pytest.raises(InvalidValue, match=rf"^config\.diffusion\.steps={steps} "):
        Diffusion(steps)


@pytest.mark.parametrize(
    "key, known", [("schedule", SCHEDULES), ("prediction", PREDICTIONS), ("variance", VARIANCES)]
)
def test_unknown_names_are_one_sentence_that_lists_the_known(key, known):
    sentence = f"^config.diffusion.{key}='nonsense' is unknown; known: {', '.join(known)}$"
    with pytest.raises(InvalidValue, match=sentence):
        Diffusion(100, **{key: "nonsense"})


def test_a_diffusion_is_a_value():
    assert Diffusion(100) == Diffusion(100) and hash(Diffusion(100)) == hash(Diffusion(100))
    with pytest.raises(dataclasses.FrozenInstanceError):
        LINEAR.steps = 3


# Conversions.


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(sorted(DIFFUSIONS)),
    u=st.floats(0, 1),
    x0=st.floats(-1, 1, width=32),
    eps=st.floats(-4, 4, width=32),
    prediction=st.sampled_from(sorted(PREDICTIONS)),
)
def test_the_exact_target_gives_the_exact_noise_and_image(key, u, x0, eps, prediction):
    diffusion = dataclasses.replace(DIFFUSIONS[key], prediction=prediction)
    t = times([round(u * (diffusion.steps - 1))])
    x0, eps = images(x0), images(eps)
    xt = diffusion.q_sample(x0, t, eps)
    a, b = np.sqrt(diffusion.abar[t]).item(), np.sqrt(1 - diffusion.abar[t]).item()
    np.testing.assert_allclose(xt, a * x0 + b * eps, atol=1e-5)

    estimate = estimate_of(diffusion, diffusion.target(x0, t, eps), xt, t)
    assert estimate.log_variance is None
    # Rounding errors of a few 1e-7 in xt are divided by b in eps, and by a in x0. Those in the
    # posterior mean, which contains c x0, are multiplied by a / c in eps.
    c, _ = diffusion.posterior_scales(t)
    tolerance = max(1, a / c.item()) if prediction == "previous" else 1
    np.testing.assert_allclose(estimate.eps, eps, atol=3e-6 / b * tolerance)
    np.testing.assert_allclose(diffusion.x0_from_eps(xt, t, eps), x0, atol=3e-6 / a)
    np.testing.assert_allclose(diffusion.eps_from_x0(xt, t, x0), eps, atol=3e-6 / b)


def test_targets_are_the_quantities_they_are_named_after():
    x0, eps, t = noise(0, 3, 2, 2, 1), noise(1, 3, 2, 2, 1), times([0, 400, 999])
    a, b = (np.sqrt(q)[t][:, None, None, None] for q in (LINEAR.abar, 1 - LINEAR.abar))
    for prediction, expected in {"eps": eps, "x0": x0, "v": a * eps - b * x0}.items():
        target = dataclasses.replace(LINEAR, prediction=prediction).target(x0, t, eps)
        np.testing.assert_allclose(target, expected, atol=1e-5)


# Min-SNR.


MIN_SNR = [name for name, prediction in PREDICTIONS.items() if prediction.min_snr is not None]


def test_min_snr_weights_the_error_of_x0_the_same_under_every_prediction():
    gamma, t = 5.0, jnp.arange(0, 1000, 37)
    x0, eps = noise(0, len(t), 2, 2, 1), noise(1, len(t), 2, 2, 1)
    xt = LINEAR.q_sample(x0, t, eps)
    snr = (LINEAR.abar / (1 - LINEAR.abar))[t]
    assert (snr < gamma).any() and (snr > gamma).any()
    wrong = 0.9 * x0 + 0.05 * noise(2, *x0.shape)  # some estimate of x0
    expected = np.minimum(snr, gamma) * ((wrong - x0) ** 2).mean(axis=(1, 2, 3))
    for prediction in MIN_SNR:
        diffusion = dataclasses.replace(LINEAR, prediction=prediction)
        eps_wrong = diffusion.eps_from_x0(xt, t, wrong)
        error = diffusion.target(x0, t, eps) - diffusion.target(wrong, t, eps_wrong)
        weighted = diffusion.loss_weight(t, gamma) * (error**2).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(weighted, expected, rtol=2e-2)


@pytest.mark.parametrize("prediction", MIN_SNR)
def test_min_snr_weights_are_the_closed_form(prediction):
    diffusion = dataclasses.replace(LINEAR, prediction=prediction)
    t = jnp.arange(1000)
    snr = LINEAR.abar / (1 - LINEAR.abar)
    divisor = {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
    np.testing.assert_allclose(
        diffusion.loss_weight(t, 5.0), np.minimum(snr, 5) / divisor, rtol=1e-5
    )
    np.testing.assert_array_equal(diffusion.loss_weight(t, 0.0), np.ones(1000))


# Pixels.


def test_every_pixel_value_survives_the_round_trip():
    every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    x = pixels_to_float(every)
    assert x.dtype == jnp.float32 and x.min() == -1 and x.max() == 1
    np.testing.assert_allclose(x.ravel(), np.arange(256) / 127.5 - 1, atol=1e-6)
    back = float_to_pixels(x)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, every)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1, 1, width=32))
def test_floats_become_the_nearest_pixel(x):
    exact = (np.float32(x) + np.float32(1)) * np.float32(127.5)
    assert float_to_pixels(images(x)).item() == np.round(exact)


def test_floats_beyond_the_range_are_clipped():
    pixels = float_to_pixels(images([-1.5, -1, 1, 1.004, 40, -jnp.inf, jnp.inf]))
    np.testing.assert_array_equal(pixels.ravel(), [0, 0, 255, 255, 255, 0, 255])


@pytest.mark.parametrize("steps", [500, 1000, 4000])
@pytest.mark.parametrize("prediction", ["x0", "v", "previous"])
def test_x0_of_a_network_that_knows_it_is_exact_at_the_noisy_end(steps, prediction):
    """Computed from its eps, it would be off by up to 1.7 pixel levels of 1 / 127.5."""
    diffusion, rng = Diffusion(steps, "cosine", prediction), np.random.default_rng(0)
    x0, eps = rng.uniform(-1, 1, 999), rng.normal(size=999)
    t = steps - 1
    a, b = (f(diffusion.abar[t]) for f in (np.sqrt, lambda abar: np.sqrt(1 - abar)))
    xt = np.float32(a * x0 + b * eps)
    c, d = (float(x[0, 0, 0, 0]) for x in diffusion.posterior_scales(times([t])))
    raw = {"x0": x0, "v": (a * xt - x0) / b, "previous": c * x0 + d * xt}[prediction]
    estimate = estimate_of(diffusion, images(raw), images(xt), times([t] * 999))
    found = x0_of(diffusion, estimate, images(xt), times([t] * 999)).ravel()
    np.testing.assert_allclose(found, x0, atol=1e-2 / 127.5)
    if prediction == "x0":
        np.testing.assert_array_equal(found, np.float32(x0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_follows_an_eps_that_guidance_has_changed(prediction):
    diffusion, rng = Diffusion(100, prediction=prediction), np.random.default_rng(0)
    raw, xt, change = (images(rng.normal(size=100)) for _ in range(3))
    t = times(np.arange(100))
    estimate = estimate_of(diffusion, raw, xt, t)
    guided = estimate._replace(eps=estimate.eps + change)
    expected = diffusion.x0_from_eps(xt, t, guided.eps)
    np.testing.assert_allclose(x0_of(diffusion, guided, xt, t), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m", "heun"])
def test_the_last_step_of_every_sampler_returns_the_networks_own_x0(sampler):
    diffusion, keys = Diffusion(4000, "cosine", "x0"), jax.random.split(jax.random.key(0), 4)
    own = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)), jnp.float32)
    start = initial_noise(diffusion, keys, (8, 8, 1))
    method = Method(sampler=sampler, steps=1, threshold="static")
    found, _ = reverse(
        lambda x, t: diffusion.estimate(own, x, t),
        diffusion,
        start,
        keys,
        timesteps(diffusion, 1),
        method,
    )
    np.testing.assert_array_equal(found, own)
