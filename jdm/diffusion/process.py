"""The diffusion process: schedules, tables, and every conversion between its quantities.

Owns the closed forms and the one map between pixels and the numbers the network sees. Knows no
network: what a network returned comes in as an array.

With abar_t = prod_{s <= t} (1 - beta_s), t in [0, T), 0 = least noisy:

(1)  q(x_t | x_0)  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps         Ho et al. 2020, eq. 4
(2)  posterior     q(x_s | x_t, x_0) is Gaussian, s < t                  Ho et al. 2020, eq. 6-7
(3)  v_t           v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0           Salimans & Ho 2022
(4)  variance      log var = f log beta + (1 - f) log beta~, f learned   Nichol & Dhariwal 2021,
                                                                         eq. 15
(5)  bound         L_t = KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)), L_0 = -log p(x_0|x_1)
                                                                         Ho et al. 2020, eq. 5, 13
(6)  min-SNR       S = abar_t / (1 - abar_t), weights min(S, gamma) / S for eps,
                   min(S, gamma) for x0, min(S, gamma) / (S + 1) for v   Hang et al. 2023

Tables are computed in float64 and cast to float32 where they are used.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

Images = Float[Array, "b h w c"]
Times = Int[Array, " b"]


class Estimate(NamedTuple):
    """What a network knows at (x_t, t): all that a sampler or a guidance ever sees of it.

    eps: the noise estimate [B, H, W, C]. log_variance: of the reverse step from t to t - 1,
    [B, H, W, C], or None where the network does not learn it.
    """

    eps: Images
    log_variance: Images | None = None


class Level(NamedTuple):
    """A noise level: abar, and noise = 1 - abar, each to the last digit it has room for.

    Near the image 1 - abar would lose a thousandth of itself if it were taken in float32.
    """

    abar: Array
    noise: Array

    @classmethod
    def of(cls, abar: np.ndarray | float) -> "Level":
        """The levels of abar in float64, as float32."""
        return cls(jnp.asarray(abar, jnp.float32), jnp.asarray(1 - abar, jnp.float32))


def _beta(at_t: Level, at_s: Level) -> Array:
    """1 - abar_t / abar_s, of the step from s to t, with its digits at either end of the chain."""
    return at_t.noise - at_s.noise * (at_t.abar / at_s.abar)


def _posterior_scales(at_t: Level, at_s: Level) -> tuple[Array, Array]:
    """(c, d) of the mean c x_0 + d x_t of (2); exactly (1, 0) where s is the clean image."""
    return (
        jnp.sqrt(at_s.abar) * _beta(at_t, at_s) / at_t.noise,
        jnp.sqrt(at_t.abar / at_s.abar) * at_s.noise / at_t.noise,
    )


def _linear(first: float, last: float) -> Callable[[int], np.ndarray]:
    """Betas from first·s to last·s, s = 1000/T, so that any T ends at about the same abar."""

    def betas(steps: int) -> np.ndarray:
        if steps < 10:  # so few steps need betas ten times larger to arrive at noise
            scale = 100 / steps
            return np.linspace(0.01 * scale, 0.02 * scale, steps, dtype=np.float64)
        scale = 1000 / steps
        return np.linspace(first * scale, last * scale, steps, dtype=np.float64)

    return betas


def _cosine(steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17: abar(u) = cos²(pi/2 · (u + 0.008) / 1.008), u = t / T."""
    abar = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": _linear(0.001, 0.02),  # the published joint model's
    "linear_ddpm": _linear(0.0001, 0.02),  # Ho et al. 2020, section 4
    "cosine": _cosine,
}

# What the network's raw output stands for: (raw, xt, a, b, c, d) -> eps, where (1) is
# x_t = a x_0 + b eps, and the mean of q(x_{t-1} | x_t, x_0), the target of "previous", is
# c x_0 + d x_t (2); at t = 0 that mean is x_0.
PREDICTIONS: dict[str, Callable[..., Array]] = {
    "eps": lambda raw, xt, a, b, c, d: raw,
    "x0": lambda raw, xt, a, b, c, d: (xt - a * raw) / b,
    "v": lambda raw, xt, a, b, c, d: a * raw + b * xt,  # (3)
    "previous": lambda raw, xt, a, b, c, d: (xt - a / c * (raw - d * xt)) / b,
}

# The same as regression targets: (x0, eps, a, b, c, d) -> target.
TARGETS: dict[str, Callable[..., Array]] = {
    "eps": lambda x0, eps, a, b, c, d: eps,
    "x0": lambda x0, eps, a, b, c, d: x0,
    "v": lambda x0, eps, a, b, c, d: a * eps - b * x0,
    "previous": lambda x0, eps, a, b, c, d: c * x0 + d * (a * x0 + b * eps),
}

# (6): the weight of the squared error of each target: (SNR, gamma) -> weight. The error of
# "previous" is that of x_0 times c², a steep weighting of the noise levels in itself: (6) has none.
MIN_SNR_WEIGHTS: dict[str, Callable[..., Array]] = {
    "eps": lambda snr, gamma: jnp.minimum(snr, gamma) / snr,
    "x0": lambda snr, gamma: jnp.minimum(snr, gamma),
    "v": lambda snr, gamma: jnp.minimum(snr, gamma) / (snr + 1),
}

VARIANCES = ("fixed_small", "fixed_large", "learned")


def pick(name: str, value: str, known) -> str:
    """value, if it is one of the known; else one sentence that names the key and lists them."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(known)}")
    return value


def pixels_to_float(images: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """uint8 pixels to float32 in [-1, 1]. THE pixel map; float_to_pixels is its inverse."""
    return images.astype(jnp.float32) / 127.5 - 1


def float_to_pixels(x: Float[Array, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """Floats to uint8 pixels, round((x + 1) · 127.5); what lies outside [-1, 1] is clipped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A schedule of T steps and what the network predicts under it.

    steps: T. schedule: one of SCHEDULES. prediction: what the network's raw output is, one of
    PREDICTIONS. variance: of the reverse step, one of VARIANCES; "learned" takes it from the
    second half of the output channels (4).

    Raises ValueError for an unknown name, and for a schedule whose betas leave (0, 1).
    """

    steps: int = 1000
    schedule: str = "linear"
    prediction: str = "eps"
    variance: str = "fixed_large"

    def __post_init__(self):
        pick("diffusion.schedule", self.schedule, SCHEDULES)
        pick("diffusion.prediction", self.prediction, PREDICTIONS)
        pick("diffusion.variance", self.variance, VARIANCES)
        if self.steps < 1:
            raise ValueError(f"diffusion.steps={self.steps} must be at least 1")
        if not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError(
                f"diffusion.steps={self.steps} makes betas of schedule {self.schedule!r} leave "
                f"(0, 1): they run to {self.betas.max():.3g}; take more steps"
            )

    # Tables, numpy float64 [T].

    @functools.cached_property
    def betas(self) -> np.ndarray:
        return SCHEDULES[self.schedule](self.steps)

    @functools.cached_property
    def abar(self) -> np.ndarray:
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """beta~_t, the variance of (2) for s = t - 1; 0 at t = 0."""
        abar_prev = np.append(1.0, self.abar[:-1])
        return self.betas * (1 - abar_prev) / (1 - self.abar)

    @functools.cached_property
    def small_log_variance(self) -> np.ndarray:
        """log beta~_t; its value at 0 would be log 0 and is replaced by the one at 1."""
        variance = self.posterior_variance
        return np.log(np.append(variance[min(1, self.steps - 1)], variance[1:]).clip(1e-20))

    @functools.cached_property
    def large_log_variance(self) -> np.ndarray:
        """log beta_t, with the posterior's value at 0 as published."""
        return np.append(self.small_log_variance[0], np.log(self.betas[1:]))

    def at(self, table: np.ndarray, t: Times) -> Float[Array, "b 1 1 1"]:
        """table[t] as float32, shaped to broadcast over images."""
        return jnp.asarray(table, jnp.float32)[t][:, None, None, None]

    def scales(self, t: Times) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
        """(sqrt(abar_t), sqrt(1 - abar_t))."""
        return self.at(np.sqrt(self.abar), t), self.at(np.sqrt(1 - self.abar), t)

    def levels(self, t: Times) -> tuple[Level, Level]:
        """The levels at t and at t - 1, which is the clean image at t = 0; [B, 1, 1, 1]."""
        before = np.append(1.0, self.abar[:-1])
        return tuple(Level(self.at(x, t), self.at(1 - x, t)) for x in (self.abar, before))

    def posterior_scales(self, t: Times) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
        """(c, d) of the mean c x_0 + d x_t of (2) for s = t - 1; (1, 0) at t = 0."""
        return _posterior_scales(*self.levels(t))

    # Between x0, xt, eps and what the network predicts.

    def q_sample(self, x0: Images, t: Times, eps: Images) -> Images:
        """x_t given x_0 and the noise (1)."""
        a, b = self.scales(t)
        return a * x0 + b * eps

    def x0_from_eps(self, xt: Images, t: Times, eps: Images) -> Images:
        """(1) solved for x_0."""
        a, b = self.scales(t)
        return (xt - b * eps) / a

    def eps_from_x0(self, xt: Images, t: Times, x0: Images) -> Images:
        """(1) solved for eps."""
        a, b = self.scales(t)
        return (xt - a * x0) / b

    def target(self, x0: Images, t: Times, eps: Images) -> Images:
        """What the network's output is regressed on."""
        return TARGETS[self.prediction](x0, eps, *self.scales(t), *self.posterior_scales(t))

    def loss_weight(self, t: Times, gamma: float) -> Float[Array, " b"]:
        """Weight of the squared error at t: min-SNR (6), or 1 where gamma is 0."""
        if gamma == 0:
            return jnp.ones(t.shape)
        snr = jnp.asarray(self.abar / (1 - self.abar), jnp.float32)[t]
        return MIN_SNR_WEIGHTS[self.prediction](snr, gamma)

    def split(self, raw: Float[Array, "b h w c2"]) -> tuple[Array, Array | None]:
        """The network's output into (its estimate, the variance values or None)."""
        if self.variance == "learned":
            mean, variance = jnp.split(raw, 2, axis=-1)
            return mean, variance
        return raw, None

    def estimate(self, raw: Float[Array, "b h w c2"], xt: Images, t: Times) -> Estimate:
        """The network's raw output at (xt, t) as an Estimate: the one place where it becomes eps.

        raw: [B, H, W, C], or [B, H, W, 2C] with learned variance.
        """
        mean, variance = self.split(raw)
        eps = PREDICTIONS[self.prediction](mean, xt, *self.scales(t), *self.posterior_scales(t))
        if variance is None:
            return Estimate(eps)
        fraction = (variance + 1) / 2
        low, high = self.at(self.small_log_variance, t), self.at(np.log(self.betas), t)
        return Estimate(eps, fraction * high + (1 - fraction) * low)  # (4)

    # The reverse step and the bound.

    def posterior_mean(self, x0: Images, xt: Images, at_t: Level, at_s: Level) -> Images:
        """Mean of q(x_s | x_t, x_0) for any s < t (2); s may be the clean image, of abar 1.

        at_t, at_s: broadcast against the images.
        """
        c, d = _posterior_scales(at_t, at_s)
        return c * x0 + d * xt

    def step_variance(self, at_t: Level, at_s: Level) -> Array:
        """Variance of q(x_s | x_t, x_0) (2); 0 where s is the clean image."""
        return _beta(at_t, at_s) * at_s.noise / at_t.noise

    def log_variance(self, estimate: Estimate, t: Times, at_t: Level, at_s: Level) -> Array:
        """Log variance of the reverse step from t to s, fixed or as the network estimates it.

        For s = t - 1 these are the tables; for a longer step the same formulas over the shorter
        chain, with a learned variance keeping its place between the two ends (4).
        """
        high = jnp.log(_beta(at_t, at_s))
        low = jnp.log(jnp.maximum(self.step_variance(at_t, at_s), 1e-20))
        if estimate.log_variance is not None:
            one_low = self.at(self.small_log_variance, t)
            # In float64: at the noisy end of a long chain the two are equal in float32.
            gap = self.at(np.log(self.betas) - self.small_log_variance, t)
            fraction = (estimate.log_variance - one_low) / gap
            return fraction * high + (1 - fraction) * low
        return low if self.variance == "fixed_small" else high

    def bound(self, estimate: Estimate, x0: Images, xt: Images, t: Times) -> Float[Array, " b"]:
        """One term of the variational bound (5) at t, in bits per dimension [B].

        The decoder at t = 0 is a Gaussian integrated over each of the 256 pixel bins.
        """
        x0_estimate = self.x0_from_eps(xt, t, estimate.eps)
        mean = self.posterior_mean(x0_estimate, xt, *self.levels(t))
        log_variance = estimate.log_variance
        if log_variance is None:
            fixed = {"fixed_small": self.small_log_variance, "fixed_large": self.large_log_variance}
            log_variance = self.at(fixed[self.variance], t)
        true_mean = self.posterior_mean(x0, xt, *self.levels(t))
        true_log_variance = self.at(self.small_log_variance, t)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + jnp.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * jnp.exp(-log_variance)
        )
        likelihood = -_log_pixel_likelihood(x0, mean, 0.5 * log_variance)
        nats = jnp.where((t == 0)[:, None, None, None], likelihood, divergence)
        return nats.mean(axis=(1, 2, 3)) / np.log(2)


def _log_pixel_likelihood(x0: Images, mean: Images, log_scale: Array) -> Images:
    """Log mass that N(mean, exp(log_scale)²) gives to the pixel bin around x0; ends are open."""
    # Mirrored to below the mean where it lies above: there float32 tells the two apart.
    sign = jnp.where(x0 > mean, -1, 1)
    centre, inverse = sign * (x0 - mean), jnp.exp(-log_scale)
    upper = jax.scipy.stats.norm.cdf((centre + 1 / 255) * inverse)
    lower = jax.scipy.stats.norm.cdf((centre - 1 / 255) * inverse)
    upper = jnp.where(sign * x0 > 0.999, 1.0, upper)
    lower = jnp.where(sign * x0 < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))
