"""jdm.training.terms.diffusion: the squared error, its weights, and the bound."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jdm.diffusion.process import PREDICTIONS
from jdm.names import LOSS_KINDS


def pixels(value: float, size: int, channels: int = 1):
    """(images of one grey value, the float that stands for it)."""
    level = round((value + 1) * 127.5)
    images = jnp.full((8, size, size, channels), level, jnp.uint8)
    return {"image": images, "label": jnp.full((8,), -1, jnp.int32)}, level / 127.5 - 1


def noise_of(diffusion, seen, x0):
    """(abar, the noise) of noised images."""
    abar = diffusion.abar[np.asarray(seen.t)][:, None, None, None]
    return abar, (np.asarray(seen.x) - np.sqrt(abar) * x0) / np.sqrt(1 - abar)


def test_a_network_that_knows_nothing_has_the_mean_square_of_the_noise_as_its_error(toy):
    found = toy.evaluate(toy.joint_loss(classify="noised", weight=0.0))
    _, eps = noise_of(toy.DIFFUSION, found, toy.X0)
    np.testing.assert_allclose(found.loss, (eps**2).mean(), rtol=1e-4)
    assert found.sums["diffusion"] == found.loss


def test_importance_weights_weight_the_loss_and_the_logged_error(toy):
    loss_fn, importance = toy.joint_loss(terms=("diffusion",)), jnp.arange(8.0) / 3.5
    t = jnp.arange(8)
    rows = loss_fn.rows(toy.BATCH, t, importance, toy.keys(), jnp.int32(0))
    loss, (_, metrics, values) = loss_fn(toy.PARAMS, {}, rows, toy.keys()["dropout"])
    np.testing.assert_allclose(loss, (importance * values["diffusion"]).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["diffusion"], (loss, 1), rtol=1e-5)


@pytest.mark.parametrize("size, channels", [(2, 1), (16, 3)])
def test_the_error_is_a_mean_over_pixels_and_channels(toy, size, channels):
    batch, x0 = pixels(0.6, size, channels)
    diffusion = dataclasses.replace(toy.DIFFUSION, prediction="x0")
    params = toy.PARAMS | {"raw": 0.1 + jnp.zeros(channels)}  # off by x0 - 0.1 at every pixel
    found = toy.evaluate(toy.joint_loss(diffusion, classify="noised"), params, batch)
    assert np.isclose(found.loss, (x0 - 0.1) ** 2)


@pytest.mark.parametrize("prediction", [k for k, p in PREDICTIONS.items() if p.min_snr])
def test_errors_are_weighted_by_min_snr_and_logged_unweighted(toy, prediction):
    batch, x0 = pixels(-0.4, size=4)
    diffusion = dataclasses.replace(toy.DIFFUSION, prediction=prediction)
    loss_fn = toy.joint_loss(diffusion, classify="noised", min_snr_gamma=2.0)
    found = toy.evaluate(loss_fn, batch=batch)
    abar, eps = noise_of(diffusion, found, x0)
    snr = (abar / (1 - abar))[:, 0, 0, 0]
    weight = np.minimum(snr, 2) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
    v = np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0
    target = {"eps": eps, "x0": x0 + 0 * eps, "v": v}[prediction]
    error = (target**2).mean(axis=(1, 2, 3))  # the network's output is 0
    np.testing.assert_allclose(found.loss, (weight * error).mean(), rtol=1e-4)
    np.testing.assert_allclose(found.sums["diffusion"], error.mean(), rtol=1e-4)


# Learned variance.


def random_raw(toy, channels: int):
    """Parameters under which every pixel of every row has a different output."""
    return toy.PARAMS | {"raw": jnp.asarray(toy.RNG.normal(size=(8, 4, 4, channels)), jnp.float32)}


def mean_bound(toy, diffusion, params, seen):
    estimate = diffusion.estimate(params["raw"], seen.x, seen.t)
    return diffusion.bound(estimate, jnp.asarray(toy.X0, jnp.float32), seen.x, seen.t).mean()


def test_the_bound_trains_the_variance_and_leaves_the_mean_to_the_error(toy):
    diffusion = dataclasses.replace(toy.DIFFUSION, variance="learned")
    params = random_raw(toy, 2)
    off, weak, strong = (
        toy.gradient(toy.joint_loss(diffusion, variance_weight=weight), params)["raw"]
        for weight in (0.0, 0.001, 0.002)
    )
    np.testing.assert_array_equal(off[..., 1:], np.zeros((8, 4, 4, 1)))
    assert np.abs(off[..., :1]).min() > 0
    np.testing.assert_allclose(weak[..., :1], off[..., :1], rtol=1e-5)  # the mean
    assert np.abs(weak[..., 1:]).min() > 0
    np.testing.assert_allclose(strong[..., 1:], 2 * weak[..., 1:], rtol=1e-4)


def test_the_bound_is_scaled_to_the_whole_chain(toy):
    diffusion = dataclasses.replace(toy.DIFFUSION, variance="learned")
    params = random_raw(toy, 2)
    found = toy.evaluate(toy.joint_loss(diffusion, classify="noised", weight=0.0), params)
    expected = 0.001 * 50 * mean_bound(toy, diffusion, params, found)
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], expected, rtol=1e-4)


# The variational bound as the loss.


@pytest.mark.parametrize("variance, channels", [("fixed_large", 1), ("learned", 2)])
def test_the_loss_is_the_bound_and_rescaled_the_bound_of_the_whole_chain(toy, variance, channels):
    diffusion = dataclasses.replace(toy.DIFFUSION, variance=variance)
    params = random_raw(toy, channels)
    found = {
        kind: toy.evaluate(
            toy.joint_loss(diffusion, kind=kind, classify="noised", weight=0.0), params
        )
        for kind in LOSS_KINDS
    }
    bound = mean_bound(toy, diffusion, params, found["kl"])
    np.testing.assert_allclose(found["kl"].loss, bound, rtol=1e-4)
    np.testing.assert_allclose(found["rescaled_kl"].loss, 50 * bound, rtol=1e-4)
    # The squared error is logged whatever is trained.
    assert len({one.sums["diffusion"] for one in found.values()}) == 1


def test_the_gradient_of_the_bound_reaches_the_mean_and_the_variance(toy):
    diffusion = dataclasses.replace(toy.DIFFUSION, variance="learned")
    params = random_raw(toy, 2)
    settings = dict(kind="kl", classify="noised", weight=0.0, variance_weight=0.0)
    loss_fn = toy.joint_loss(diffusion, **settings)
    grad = np.asarray(toy.gradient(loss_fn, params)["raw"])
    seen = toy.evaluate(loss_fn, params)
    # At t > 0 the mean is in the bound as (mu~ - mu)² / (2 sigma²), mu = mu~ + k (eps - eps_hat).
    t = np.asarray(seen.t)
    later = t > 0
    assert later.sum() > 5 and np.abs(grad[later, ..., 1:]).min() > 0
    abar, eps = noise_of(diffusion, seen, toy.X0)
    abar_s = np.append(1, diffusion.abar)[t][:, None, None, None]
    k = np.sqrt(abar_s) * (1 - abar / abar_s) / (1 - abar) * np.sqrt((1 - abar) / abar)
    log_variance = np.asarray(diffusion.estimate(params["raw"], seen.x, seen.t).log_variance)
    slope = k**2 * (np.asarray(params["raw"])[..., :1] - eps) / np.exp(log_variance)
    expected = (slope / np.log(2) / eps.size)[later]
    np.testing.assert_allclose(grad[later, ..., :1], expected, rtol=1e-2, atol=1e-5)
