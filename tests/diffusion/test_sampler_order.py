"""The errors of samplers, and how fast they fall with steps, on a mixture and on a Gaussian.

The data are single pixels whose best noise estimate is known in closed form, and with it the exact
probability-flow ODE dx/dphi = v, solved here in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, Estimate
from jdm.diffusion.samplers import SAMPLERS, SPACINGS, ddim_inverse, reverse, timesteps

WEIGHTS, CENTRES = np.array([0.3, 0.7]), np.array([-0.6, 0.4])
WIDE, NARROW = 0.3, 0.1  # deviations of the modes: one smooth flow, one with two clear modes
MEAN, DEVIATION = 0.4, 0.5  # of the Gaussian

# Long, so that rounding to whole times changes the steps little. The error after 80 steps is far
# above that of float32: computed in float64 it differs in the fourth digit.
LONG = Diffusion(20_000)
COUNTS = (10, 20, 40, 80)


def mixture(xp, x, abar, variance, deviation):
    """(E[x_0 | x_t], E[eps | x_t]) of the two modes; variance: 1 - abar. xp: numpy or jax.numpy."""
    total = abar * deviation**2 + variance
    offsets = [x - xp.sqrt(abar) * centre for centre in CENTRES]
    scores = [xp.log(w) - y**2 / (2 * total) for w, y in zip(WEIGHTS, offsets, strict=True)]
    upper = 1 / (1 + xp.exp(xp.clip(scores[0] - scores[1], -80, 80)))
    centre = (1 - upper) * CENTRES[0] + upper * CENTRES[1]
    offset = (1 - upper) * offsets[0] + upper * offsets[1]
    x0 = (variance * centre + xp.sqrt(abar) * deviation**2 * x) / total
    return x0, xp.sqrt(variance) * offset / total


def mixture_eps(diffusion: Diffusion, deviation: float):
    def eps_fn(x, t):
        abar, variance = (diffusion.at(table, t) for table in (diffusion.abar, 1 - diffusion.abar))
        return Estimate(mixture(jnp, x, abar, variance, deviation)[1])

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


def walk(eps_fn, diffusion, start, steps, spacing="uniform", sampler="ddim"):
    """(the image, x at the last visit) from start [N], [N] each."""
    seen, times, keys = [], timesteps(diffusion, steps, spacing), make_keys(len(start))
    method = Method(sampler=sampler, threshold="none")

    def watched(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return eps_fn(x, t)

    @jax.jit
    def run(x):
        return reverse(watched, diffusion, x, keys, times, method)[0]

    image = np.asarray(run(pixels(start)))
    jax.effects_barrier()
    return image.ravel(), seen[-1].ravel()


@pytest.fixture
def draws(draw):
    """draws(eps_fn, diffusion, **options) -> 32768 samples."""
    many = dict(keys=make_keys(64), shape=(8, 8, 8), optimise=True, threshold="none")
    return lambda eps_fn, diffusion, **options: draw(eps_fn, diffusion, **many, **options).ravel()


def rms(errors) -> float:
    return np.sqrt(np.mean(np.square(errors)))


def slope(errors) -> float:
    """p of errors that fall as steps^-p."""
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


STARTS = np.linspace(-2.5, 2.5, 33)


# Order.


def without_memory(steps):
    """DPM-Solver++ whose previous estimate is replaced by the present one."""
    return steps._replace(step=lambda memory, x, x0, *rest: steps.step(x0, x, x0, *rest))


def without_corrector(steps):
    """Heun's method without its corrector."""

    def step(memory, x, x0, estimate, visit, draw):
        memory, x_s = steps.step(memory, x, x0, estimate, visit, draw)
        return memory, jnp.where(visit.predicted, x, x_s)

    return steps._replace(step=step)


@pytest.mark.parametrize(
    "name, order, change",
    [
        ("ddim", 1, None),
        ("dpmpp_2m", 2, None),
        ("heun", 2, None),
        ("dpmpp_2m", 1, without_memory),
        ("heun", 1, without_corrector),
    ],
)
def test_error_falls_with_steps_at_the_order_of_the_sampler(monkeypatch, name, order, change):
    """Before the last step, to the clean image, which is the same for all samplers."""
    if change is not None:
        make = SAMPLERS[name].make
        changed = SAMPLERS[name]._replace(make=lambda *given: change(make(*given)))
        monkeypatch.setitem(SAMPLERS, name, changed)
    exact, eps_fn = flow(LONG, STARTS, last=0), mixture_eps(LONG, WIDE)
    errors = []
    for steps in COUNTS:
        _, x = walk(eps_fn, LONG, STARTS, steps, "log_snr", sampler=name)
        errors.append(rms(x - exact))
    assert order - 0.3 < slope(errors) < order + 0.3, errors


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_moments_of_ancestral_are_of_first_order(draws, variance):
    # 32768 draws: a standard error of 0.4 % of the deviation, where 80 steps leave an error of 6 %
    # with small and 3 % with large variance; so the slope's error is at most 0.06. Computed without
    # draws, from the mean and variance of each affine step, the slopes are 0.87 and 1.07.
    diffusion = Diffusion(20_000, variance=variance)
    errors, eps_fn = [], gaussian_eps(diffusion)
    for steps in COUNTS:
        x = draws(eps_fn, diffusion, sampler="ancestral", steps=steps, spacing="log_snr")
        np.testing.assert_allclose(x.mean(), MEAN, atol=4 * x.std() / 2**7.5)
        errors.append(abs(x.std() / DEVIATION - 1))
    assert 0.7 < slope(errors) < 1.3, errors


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_higher_order_is_more_accurate_from_twenty_steps_in_every_spacing(schedule, spacing):
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
def test_both_modes_get_their_share_and_their_spread(draws, name, steps, share_error, spread_error):
    # 32768 draws: standard errors are 0.0025 for the share of a mode, 0.7 % for its spread, and 1 %
    # of its spread for its centre. *_error: the discretisation error of these steps, computed in
    # float64 from 200,000 quantiles of x_T (from seeded noise for ancestral), rounded up; that of
    # the centres is at most 4 %.
    diffusion = Diffusion(1000, "cosine")
    x = draws(mixture_eps(diffusion, NARROW), diffusion, sampler=name, steps=steps)
    modes = x[x < -0.1], x[x >= -0.1]
    for mode, weight, centre in zip(modes, WEIGHTS, CENTRES, strict=True):
        assert abs(len(mode) / len(x) - weight) < 4 * 0.0025 + share_error
        assert abs(mode.mean() - centre) < NARROW * (4 * 0.01 + 0.04)
        assert abs(mode.std() / NARROW - 1) < 4 * 0.007 + spread_error
    assert (np.abs(x + 0.1) < 0.1).mean() < 0.001  # nothing in between


# Inversion.


def invert(diffusion, images, steps, iterations):
    times, eps_fn = timesteps(diffusion, steps), gaussian_eps(diffusion)

    @jax.jit
    def run(x0):
        return ddim_inverse(eps_fn, diffusion, x0, times, iterations)

    return np.asarray(run(pixels(images))).ravel()


def test_ddim_returns_closer_to_an_inverted_image_with_more_iterations():
    diffusion, images = Diffusion(1000, "cosine"), np.linspace(-1, 1, 9)
    errors = []
    for iterations in (1, 2, 3, 5):
        start = invert(diffusion, images, 20, iterations)
        back, _ = walk(gaussian_eps(diffusion), diffusion, start, 20)
        errors.append(rms(back - images))
    assert errors[0] < 0.01 and errors[-1] < 1e-5
    assert errors[1] < 0.1 * errors[0] and errors[2] < 0.1 * errors[1]


def test_inversion_converges_to_the_exact_flow_with_steps():
    diffusion, images = LONG, np.linspace(-1, 1, 9)
    abar = diffusion.abar[-1]
    wide = np.sqrt(abar * DEVIATION**2 + 1 - abar)
    exact = np.sqrt(abar) * MEAN + (images - MEAN) / DEVIATION * wide
    errors = [rms(invert(diffusion, images, steps, 4) - exact) for steps in COUNTS]
    assert 0.8 < slope(errors) < 1.3, errors
