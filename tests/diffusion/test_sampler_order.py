"""How far samplers are from what they approximate, on a mixture of two modes and on a Gaussian.

The data are single pixels whose best noise estimate is known in closed form, and with it the exact
probability-flow ODE dx/dphi = v, solved here in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jdm.diffusion.process import Diffusion, Estimate
from jdm.diffusion.samplers import SAMPLERS, SPACINGS, ddim_inverse, reverse, sample, timesteps

WEIGHTS, CENTRES = np.array([0.3, 0.7]), np.array([-0.6, 0.4])
WIDE, NARROW = 0.3, 0.1  # deviations of the modes: one smooth flow, one with two clear modes
MEAN, DEVIATION = 0.4, 0.5  # of the Gaussian

# Long, so that whole times hardly round the steps, and far from the float32 limits: images of 80
# steps in float64 differ from ours in the fourth digit of their error.
LONG = Diffusion(20_000)
COUNTS = (10, 20, 40, 80)


def mixture(xp, x, abar, noise, deviation):
    """(E[x_0 | x_t], E[eps | x_t]) of the two modes; noise: 1 - abar. xp: numpy or jax.numpy."""
    variance = abar * deviation**2 + noise
    offsets = [x - xp.sqrt(abar) * centre for centre in CENTRES]
    scores = [xp.log(w) - y**2 / (2 * variance) for w, y in zip(WEIGHTS, offsets, strict=True)]
    upper = 1 / (1 + xp.exp(xp.clip(scores[0] - scores[1], -80, 80)))
    centre = (1 - upper) * CENTRES[0] + upper * CENTRES[1]
    offset = (1 - upper) * offsets[0] + upper * offsets[1]
    x0 = (noise * centre + xp.sqrt(abar) * deviation**2 * x) / variance
    return x0, xp.sqrt(noise) * offset / variance


def mixture_eps(diffusion: Diffusion, deviation: float):
    def eps_fn(x, t):
        abar, noise = (diffusion.at(table, t) for table in (diffusion.abar, 1 - diffusion.abar))
        return Estimate(mixture(jnp, x, abar, noise, deviation)[1])

    return eps_fn


def gaussian_eps(diffusion: Diffusion):
    def eps_fn(x, t):
        a, b = diffusion.scales(t)
        return Estimate(b * (x - a * MEAN) / (a**2 * DEVIATION**2 + b**2))

    return eps_fn


def flow(diffusion: Diffusion, start, last: int):
    """The exact solution on the mixture of wide modes, from T - 1 to `last`; -1: the image."""

    def v(phi, x):
        x0, eps = mixture(np, x, np.cos(phi) ** 2, np.sin(phi) ** 2, WIDE)
        return np.cos(phi) * eps - np.sin(phi) * x0

    phi = np.append(np.arccos(np.sqrt(diffusion.abar)), 0.0)
    span = (phi[diffusion.steps - 1], phi[last])
    return solve_ivp(v, span, start, rtol=1e-10, atol=1e-11).y[:, -1]


def pixels(values):
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def make_keys(n: int):
    return jax.vmap(jax.random.key)(np.arange(n))


def walk(eps_fn, diffusion, start, steps, spacing="uniform", **settings):
    """(the image, x at the last visit) from start [N], [N] each."""
    seen, times, keys = [], timesteps(diffusion, steps, spacing), make_keys(len(start))

    def watched(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return eps_fn(x, t)

    @jax.jit
    def run(x):
        return reverse(watched, diffusion, x, keys, times, threshold="none", **settings)[0]

    image = np.asarray(run(pixels(start)))
    jax.effects_barrier()
    return image.ravel(), seen[-1].ravel()


def draw(eps_fn, diffusion, **settings):
    """32768 samples."""

    def images(keys):
        return sample(eps_fn, diffusion, keys, (8, 8, 8), **settings)

    # Millions of normal draws: worth optimising, unlike the rest of the tests.
    options = {"xla_backend_optimization_level": 1}
    return np.asarray(jax.jit(images, compiler_options=options)(make_keys(64))).ravel()


def rms(errors) -> float:
    return np.sqrt(np.mean(np.square(errors)))


def slope(errors) -> float:
    """p of errors that fall as steps^-p."""
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


STARTS = np.linspace(-2.5, 2.5, 33)


# Order.


def without_memory(diffusion, eta):
    """DPM-Solver++ that takes the estimate of the step before to be the present one."""
    method = SAMPLERS["dpmpp_2m"](diffusion, eta)
    return method._replace(step=lambda memory, x, x0, *rest: method.step(x0, x, x0, *rest))


def without_correction(diffusion, eta):
    """Heun's method that leaves every guess as it is."""
    method = SAMPLERS["heun"](diffusion, eta)

    def step(memory, x, x0, estimate, visit, draw):
        memory, there = method.step(memory, x, x0, estimate, visit, draw)
        return memory, jnp.where(visit.arriving, x, there)

    return method._replace(step=step)


@pytest.mark.parametrize(
    "name, order, method",
    [
        ("ddim", 1, None),
        ("dpmpp_2m", 2, None),
        ("heun", 2, None),
        ("dpmpp_2m without memory", 1, without_memory),
        ("heun without correction", 1, without_correction),
    ],
)
def test_error_falls_with_steps_at_the_order_of_the_method(monkeypatch, name, order, method):
    """Before the last step, to the clean image, whose error has nothing to do with the method."""
    if method is not None:
        monkeypatch.setitem(SAMPLERS, name, method)
    exact, eps_fn = flow(LONG, STARTS, last=0), mixture_eps(LONG, WIDE)
    errors = []
    for steps in COUNTS:
        _, x = walk(eps_fn, LONG, STARTS, steps, "log_snr", sampler=name)
        errors.append(rms(x - exact))
    assert order - 0.3 < slope(errors) < order + 0.3, errors


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_moments_of_ancestral_are_of_first_order(variance):
    # 32768 draws: a standard error of 0.4 % of the deviation, beside an error of 6 % with small and
    # 3 % with large variance after 80 steps, and so of at most 0.06 of the slope. Computed without
    # draws, from the mean and variance of each affine step, the slopes are 0.87 and 1.07.
    diffusion = Diffusion(20_000, variance=variance)
    errors, eps_fn = [], gaussian_eps(diffusion)
    for steps in COUNTS:
        settings = dict(sampler="ancestral", steps=steps, spacing="log_snr", threshold="none")
        draws = draw(eps_fn, diffusion, **settings)
        np.testing.assert_allclose(draws.mean(), MEAN, atol=4 * draws.std() / 2**7.5)
        errors.append(abs(draws.std() / DEVIATION - 1))
    assert 0.7 < slope(errors) < 1.3, errors


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_higher_order_is_of_use_from_twenty_steps_however_they_are_spaced(schedule, spacing):
    diffusion = Diffusion(1000, schedule)
    exact, eps_fn = flow(diffusion, STARTS, last=-1), mixture_eps(diffusion, WIDE)
    ddim, dpmpp_2m, heun = (
        rms(walk(eps_fn, diffusion, STARTS, 20, spacing, sampler=name)[0] - exact)
        for name in ("ddim", "dpmpp_2m", "heun")
    )
    assert dpmpp_2m < 0.5 * ddim and heun < 0.25 * ddim


# Two modes.


@pytest.mark.parametrize(
    "name, steps, share_error, spread_error",
    [
        ("ancestral", 400, 0.002, 0.02),
        ("ddim", 100, 0.002, 0.05),
        ("dpmpp_2m", 50, 0.001, 0.03),
        ("heun", 50, 0.001, 0.02),
    ],
)
def test_both_modes_get_their_share_and_their_spread(name, steps, share_error, spread_error):
    # 32768 draws: standard errors are 0.0025 for the share of a mode, 0.7 % for its spread, and 1 %
    # of it for its centre. *_error: what so many steps leave, computed in float64 from 200,000
    # quantiles of x_T (noise of a seed for ancestral), rounded up; of the centres, 4 % or less.
    diffusion = Diffusion(1000, "cosine")
    eps_fn, settings = mixture_eps(diffusion, NARROW), dict(sampler=name, steps=steps)
    draws = draw(eps_fn, diffusion, threshold="none", **settings)
    modes = draws[draws < -0.1], draws[draws >= -0.1]
    for mode, weight, centre in zip(modes, WEIGHTS, CENTRES, strict=True):
        assert abs(len(mode) / len(draws) - weight) < 4 * 0.0025 + share_error
        assert abs(mode.mean() - centre) < NARROW * (4 * 0.01 + 0.04)
        assert abs(mode.std() / NARROW - 1) < 4 * 0.007 + spread_error
    assert (np.abs(draws + 0.1) < 0.1).mean() < 0.001  # nothing in between


# Backwards.


def invert(diffusion, images, steps, iterations):
    times, eps_fn = timesteps(diffusion, steps), gaussian_eps(diffusion)

    @jax.jit
    def run(x0):
        return ddim_inverse(eps_fn, diffusion, x0, times, iterations)

    return np.asarray(run(pixels(images))).ravel()


def test_ddim_comes_back_to_an_inverted_image_the_closer_the_more_iterations():
    diffusion, images = Diffusion(1000, "cosine"), np.linspace(-1, 1, 9)
    errors = []
    for iterations in (1, 2, 3, 5):
        start = invert(diffusion, images, 20, iterations)
        back, _ = walk(gaussian_eps(diffusion), diffusion, start, 20, sampler="ddim")
        errors.append(rms(back - images))
    assert errors[0] < 0.01 and errors[-1] < 1e-5
    assert errors[1] < 0.1 * errors[0] and errors[2] < 0.1 * errors[1]


def test_inversion_nears_the_exact_flow_as_steps_become_finer():
    diffusion, images = LONG, np.linspace(-1, 1, 9)
    abar = diffusion.abar[-1]
    wide = np.sqrt(abar * DEVIATION**2 + 1 - abar)
    exact = np.sqrt(abar) * MEAN + (images - MEAN) / DEVIATION * wide
    errors = [rms(invert(diffusion, images, steps, 4) - exact) for steps in COUNTS]
    assert 0.8 < slope(errors) < 1.3, errors
