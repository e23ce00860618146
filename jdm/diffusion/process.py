"""The diffusion process: noise schedules, and the conversions between x_0, x_t, eps and v.

It owns these closed forms, and the conversion between pixels and floats. It contains no network:
the raw output of one is an argument here.

With abar_t = prod_{s <= t} (1 - beta_s), t in [0, T), where t = 0 is the least noisy level:

(1)  q(x_t | x_0)  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps         Ho et al. 2020, eq. 4
(2)  posterior     q(x_s | x_t, x_0) is Gaussian, s < t                  Ho et al. 2020, eq. 6-7
(3)  v_t           v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0           Salimans & Ho 2022
(4)  variance      log var = f log beta + (1 - f) log beta~, f learned   Nichol & Dhariwal 2021,
                                                                         eq. 15
(5)  bound         L_t = KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)), L_0 = -log p(x_0|x_1),
                   L_T = KL(q(x_{T-1}|x_0) || N(0, 1))                   Ho et al. 2020, eq. 5, 13
(6)  min-SNR       S = abar_t / (1 - abar_t), weights min(S, gamma) / S for eps,
                   min(S, gamma) for x0, min(S, gamma) / (S + 1) for v   Hang et al. 2023

Tables are computed in float64 and converted to float32 where they are used.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jdm import names
from jdm.arrays import Images, Times
from jdm.errors import InvalidValue

PerImage = Float[Array, "b 1 1 1"]
Table = Float[np.ndarray, " T"]  # float64, one entry for each t


class Estimate(NamedTuple):
    """What samplers and guidance see of a network's output at (x_t, t), arrays [B, H, W, C].

    eps: the noise estimate. log_variance: of the reverse step from t to t - 1; None where it is not
    learned. own: (eps, x_0), both as the network estimates them, where it estimates x_0 otherwise
    than by eps, else None. `Diffusion.x0_of` needs it: at the noisy end, where x_t is almost all
    noise, x_0 computed from a float32 eps is off by a pixel level. Guidance changes eps alone.
    """

    eps: Images
    log_variance: Images | None = None
    own: tuple[Images, Images] | None = None


class Level(NamedTuple):
    """A noise level: abar, and the variance of its noise, 1 - abar; both float32. Near the clean
    image, 1 - abar computed from a float32 abar would have a relative error of about 0.1 %."""

    abar: Array
    variance: Array

    @classmethod
    def of(cls, abar: np.ndarray | float) -> "Level":
        """The levels of float64 values of abar."""
        return cls(jnp.asarray(abar, jnp.float32), jnp.asarray(1 - abar, jnp.float32))


def _beta(at_t: Level, at_s: Level) -> Array:
    """beta of the step from s to t, 1 - abar_t / abar_s, accurate at both ends of the chain."""
    return at_t.variance - at_s.variance * (at_t.abar / at_s.abar)


def _posterior_scales(at_t: Level, at_s: Level) -> tuple[Array, Array]:
    """(c, d) of the mean c x_0 + d x_t of (2); exactly (1, 0) where s is the clean image."""
    c = jnp.sqrt(at_s.abar) * _beta(at_t, at_s) / at_t.variance
    return c, jnp.sqrt(at_t.abar / at_s.abar) * at_s.variance / at_t.variance


def _linear(steps: int, first: float, last: float) -> Table:
    """Betas from first·s to last·s, s = 1000/T, so that abar_{T-1} is about the same for any T."""
    scale = 1000 / steps
    if steps < 10:  # smaller betas, since last·s would exceed 1
        scale, first, last = 100 / steps, 0.01, 0.02
    return np.linspace(first * scale, last * scale, steps, dtype=np.float64)


def _cosine(steps: int) -> Table:
    """Nichol & Dhariwal 2021, eq. 17: abar(u) = cos²(pi/2 · (u + 0.008) / 1.008), u = t / T."""
    abar = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int], Table]] = names.SCHEDULES.records(  # T -> betas
    linear=functools.partial(_linear, first=0.001, last=0.02),  # Deja et al. 2023
    linear_ddpm=functools.partial(_linear, first=0.0001, last=0.02),  # Ho et al. 2020
    cosine=_cosine,
)


class Prediction(NamedTuple):
    """What a network predicts: the meaning of its raw output.

    a, b are the coefficients of (1), x_t = a x_0 + b eps; c, d those of the posterior mean of (2)
    for s = t - 1, c x_0 + d x_t. to_eps: (raw, xt, a, b, c, d) -> eps. to_x0: the same for x_0;
    None where x_0 is computed from eps. target: (x0, eps, a, b, c, d) -> the regression target of
    the raw output. min_snr: (SNR, gamma) -> the weight (6) of its squared error, or None where (6)
    defines none.
    """

    to_eps: Callable[..., Array]
    to_x0: Callable[..., Array] | None
    target: Callable[..., Array]
    min_snr: Callable[[Array, float], Array] | None


PREDICTIONS: dict[str, Prediction] = names.PREDICTIONS.records(
    eps=Prediction(
        to_eps=lambda raw, xt, a, b, c, d: raw,
        to_x0=None,
        target=lambda x0, eps, a, b, c, d: eps,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma) / snr,
    ),
    x0=Prediction(
        to_eps=lambda raw, xt, a, b, c, d: (xt - a * raw) / b,
        to_x0=lambda raw, xt, a, b, c, d: raw,
        target=lambda x0, eps, a, b, c, d: x0,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma),
    ),
    v=Prediction(  # (3)
        to_eps=lambda raw, xt, a, b, c, d: a * raw + b * xt,
        to_x0=lambda raw, xt, a, b, c, d: a * xt - b * raw,
        target=lambda x0, eps, a, b, c, d: a * eps - b * x0,
        min_snr=lambda snr, gamma: jnp.minimum(snr, gamma) / (snr + 1),
    ),
    previous=Prediction(  # the posterior mean; its error is c times that of x_0
        to_eps=lambda raw, xt, a, b, c, d: (xt - a / c * (raw - d * xt)) / b,
        to_x0=lambda raw, xt, a, b, c, d: (raw - d * xt) / c,
        target=lambda x0, eps, a, b, c, d: c * x0 + d * (a * x0 + b * eps),
        min_snr=None,
    ),
)

# The log variance of a reverse step: (log beta~, log beta) -> one of the two, as tables or arrays.
# None where the network learns it (4).
VARIANCES: dict[str, Any] = names.VARIANCES.records(
    fixed_small=lambda small, large: small,
    fixed_large=lambda small, large: large,
    learned=None,
)


def pixels_to_float(images: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """uint8 to float32 in [-1, 1], x / 127.5 - 1; float_to_pixels is the inverse."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_floats(images: np.ndarray | jax.Array) -> Float[Array, "n h w c"]:
    """uint8 images, or floats in [-1, 1], as floats in [-1, 1]."""
    x = jnp.asarray(images)
    return pixels_to_float(x) if x.dtype == jnp.uint8 else x


def float_to_pixels(x: Float[Array, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """Floats to uint8, round((x + 1) · 127.5); values outside [-1, 1] are clipped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A diffusion process of T noise levels, and the meaning of the network's raw output.

    steps: T. schedule: of the betas, one of SCHEDULES. prediction: one of PREDICTIONS. variance: of
    the reverse step, one of VARIANCES; "learned" takes it from the second half of the output
    channels (4).

    Raises InvalidValue for an unknown name, for T < 1, and for betas outside (0, 1).
    """

    steps: int = 1000
    schedule: str = "linear"
    prediction: str = "eps"
    variance: str = "fixed_large"

    def __post_init__(self):
        names.check_name("config.diffusion.schedule", self.schedule, SCHEDULES)
        names.check_name("config.diffusion.prediction", self.prediction, PREDICTIONS)
        names.check_name("config.diffusion.variance", self.variance, VARIANCES)
        if self.steps < 1:
            raise InvalidValue("config.diffusion.steps", self.steps, "must be at least 1")
        if not ((self.betas > 0) & (self.betas < 1)).all():
            found = f"has betas outside (0, 1) under schedule {self.schedule!r}"
            hint = f"the largest is {self.betas.max():.3g}: take more steps"
            raise InvalidValue("config.diffusion.steps", self.steps, found, hint)

    @functools.cached_property
    def betas(self) -> Table:
        return SCHEDULES[self.schedule](self.steps)

    @functools.cached_property
    def abar(self) -> Table:
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def posterior_variance(self) -> Table:
        """beta~_t, the variance of (2) for s = t - 1; 0 at t = 0."""
        abar_prev = np.append(1.0, self.abar[:-1])
        return self.betas * (1 - abar_prev) / (1 - self.abar)

    @functools.cached_property
    def small_log_variance(self) -> Table:
        """log beta~_t; at t = 0, where it would be log 0, the value at t = 1."""
        variance = self.posterior_variance
        return np.log(np.append(variance[min(1, self.steps - 1)], variance[1:]).clip(1e-20))

    @functools.cached_property
    def large_log_variance(self) -> Table:
        """log beta_t; at t = 0 the value of small_log_variance, as published."""
        return np.append(self.small_log_variance[0], np.log(self.betas[1:]))

    def at(self, table: Table, t: Times) -> PerImage:
        """table[t] as float32, shaped to broadcast over images."""
        return jnp.asarray(table, jnp.float32)[t][:, None, None, None]

    def scales(self, t: Times) -> tuple[PerImage, PerImage]:
        """(sqrt(abar_t), sqrt(1 - abar_t))."""
        return self.at(np.sqrt(self.abar), t), self.at(np.sqrt(1 - self.abar), t)

    def levels(self, t: Times) -> tuple[Level, Level]:
        """The levels t and t - 1 (for t = 0 the clean image), as arrays [B, 1, 1, 1]."""
        before = np.append(1.0, self.abar[:-1])
        here, below = (Level(self.at(x, t), self.at(1 - x, t)) for x in (self.abar, before))
        return here, below

    def posterior_scales(self, t: Times) -> tuple[PerImage, PerImage]:
        """(c, d) of the mean c x_0 + d x_t of (2) for s = t - 1; (1, 0) at t = 0."""
        return _posterior_scales(*self.levels(t))

    def q_sample(self, x0: Images, t: Times, eps: Images) -> Images:
        """x_t given x_0 and the noise (1)."""
        a, b = self.scales(t)
        return a * x0 + b * eps

    def x0_from_eps(self, xt: Images, t: Times, eps: Images) -> Images:
        """(1) solved for x_0."""
        a, b = self.scales(t)
        return (xt - b * eps) / a

    def x0_of(self, estimate: Estimate, xt: Images, t: Times) -> Images:
        """The x_0 of an estimate at (x_t, t): the network's own, where it has one, moved by as much
        as guidance has changed its eps."""
        if estimate.own is None:
            return self.x0_from_eps(xt, t, estimate.eps)
        eps, x0 = estimate.own
        a, b = self.scales(t)
        return x0 - b / a * (estimate.eps - eps)

    def eps_from_x0(self, xt: Images, t: Times, x0: Images) -> Images:
        """(1) solved for eps."""
        a, b = self.scales(t)
        return (xt - a * x0) / b

    def target(self, x0: Images, t: Times, eps: Images) -> Images:
        """The regression target of the network's raw output."""
        coefficients = *self.scales(t), *self.posterior_scales(t)
        return PREDICTIONS[self.prediction].target(x0, eps, *coefficients)

    def loss_weight(self, t: Times, gamma: float) -> Float[Array, " b"]:
        """Weight of the squared error at t: 1 where gamma is 0, else min-SNR (6). A prediction for
        which (6) defines no weight allows gamma = 0 only."""
        if gamma == 0:
            return jnp.ones(t.shape, jnp.float32)
        weight = PREDICTIONS[self.prediction].min_snr
        assert weight is not None, self.prediction
        return weight(jnp.asarray(self.abar / (1 - self.abar), jnp.float32)[t], gamma)

    def split(self, raw: Float[Array, "b h w c2"]) -> tuple[Array, Array | None]:
        """(the prediction, the learned variance values or None) of the raw output."""
        if VARIANCES[self.variance] is not None:
            return raw, None
        prediction, variance = jnp.split(raw, 2, axis=-1)
        return prediction, variance

    def estimate(self, raw: Float[Array, "b h w c2"], xt: Images, t: Times) -> Estimate:
        """The estimate that the raw output [B, H, W, C], or [B, H, W, 2C] with learned variance,
        stands for. No other code converts raw outputs to eps."""
        prediction, variance = self.split(raw)
        coefficients = *self.scales(t), *self.posterior_scales(t)
        to_eps, to_x0, *_ = PREDICTIONS[self.prediction]
        eps = to_eps(prediction, xt, *coefficients)
        own = (eps, to_x0(prediction, xt, *coefficients)) if to_x0 else None
        if variance is None:
            return Estimate(eps, None, own)
        fraction = (variance + 1) / 2
        low, high = self.at(self.small_log_variance, t), self.at(np.log(self.betas), t)
        return Estimate(eps, fraction * high + (1 - fraction) * low, own)  # (4)

    def posterior_mean(self, x0: Images, xt: Images, at_t: Level, at_s: Level) -> Images:
        """Mean of q(x_s | x_t, x_0) for any s < t (2); s may be the clean image, abar = 1. The
        levels broadcast against the images."""
        c, d = _posterior_scales(at_t, at_s)
        return c * x0 + d * xt

    def step_variance(self, at_t: Level, at_s: Level) -> Array:
        """Variance of q(x_s | x_t, x_0) (2); 0 where s is the clean image."""
        return _beta(at_t, at_s) * at_s.variance / at_t.variance

    def log_variance(self, estimate: Estimate, t: Times, at_t: Level, at_s: Level) -> Array:
        """Log variance of the reverse step from t to s, which may be longer than 1. Its beta and
        beta~ are then not those of the tables; a learned variance keeps the fraction f of (4)."""
        large = jnp.log(_beta(at_t, at_s))
        small = jnp.log(jnp.maximum(self.step_variance(at_t, at_s), 1e-20))
        if estimate.log_variance is None:
            return VARIANCES[self.variance](small, large)
        # Subtracted in float64: at the noisy end of a long chain, the two are equal in float32.
        gap = self.at(np.log(self.betas) - self.small_log_variance, t)
        fraction = (estimate.log_variance - self.at(self.small_log_variance, t)) / gap
        return fraction * large + (1 - fraction) * small

    def bound(self, estimate: Estimate, x0: Images, xt: Images, t: Times) -> Float[Array, " b"]:
        """The term of the variational bound (5) at t, in bits per dimension [B]. p(x_0 | x_1) is a
        Gaussian integrated over each of the 256 pixel bins."""
        levels = self.levels(t)
        mean = self.posterior_mean(self.x0_of(estimate, xt, t), xt, *levels)
        log_variance = estimate.log_variance
        if log_variance is None:
            tables = self.small_log_variance, self.large_log_variance
            log_variance = self.at(VARIANCES[self.variance](*tables), t)
        error = self.posterior_mean(x0, xt, *levels) - mean
        log_ratio = log_variance - self.at(self.small_log_variance, t)
        divergence = log_ratio - 1 + jnp.exp(-log_ratio) + error**2 * jnp.exp(-log_variance)
        likelihood = _log_pixel_likelihood(x0, mean, 0.5 * log_variance)
        nats = jnp.where((t == 0)[:, None, None, None], -likelihood, 0.5 * divergence)
        return nats.mean(axis=(1, 2, 3)) / np.log(2)

    def prior_bound(self, x0: Images) -> Float[Array, " b"]:
        """L_T of the variational bound (5), in bits per dimension [B]: what x_0 still tells about
        the noisiest x_t. No network changes it. With the terms of all t it makes up the bound."""
        abar = self.abar[-1]
        nats = 0.5 * (abar * x0**2 - abar - np.log1p(-abar))
        return nats.mean(axis=(1, 2, 3)) / np.log(2)


def _log_pixel_likelihood(x0: Images, mean: Images, log_scale: Array) -> Images:
    """Log probability of the bin around x0, 2 / 255 wide, under N(mean, exp(log_scale)²). The bins
    of the darkest and the brightest value extend to infinity."""
    # Values above the mean are mirrored to below it: float32 resolves a cdf near 0, not near 1.
    sign = jnp.where(x0 > mean, -1, 1)
    centre, inverse = sign * (x0 - mean), jnp.exp(-log_scale)
    cdf = jax.scipy.stats.norm.cdf
    upper, lower = cdf((centre + 1 / 255) * inverse), cdf((centre - 1 / 255) * inverse)
    upper = jnp.where(sign * x0 > 0.999, 1.0, upper)
    lower = jnp.where(sign * x0 < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))
