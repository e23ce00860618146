"""jdm.diffusion.guidance: how representations move, on toy networks with two layers or one."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.diffusion.guidance import Network, block_mask, guide, log_probabilities_of
from jdm.diffusion.method import Method
from jdm.diffusion.process import PREDICTIONS, Diffusion, Estimate
from jdm.errors import InvalidValue

DIFFUSION = Diffusion(200)
SHAPE = (2, 2, 1)
TIMES = jnp.asarray([0, 20, 60, 120, 199], jnp.int32)
LABELS = jnp.asarray([0, 1, 2, 1, 0], jnp.int32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, *SHAPE)), jnp.float32)
FLAT = np.asarray(X, np.float64).reshape(5, 4)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def guided(network, diffusion, method, targets, scale):
    return guide(network, diffusion, method, targets, scale)(X, TIMES).eps


def run(guidance, network, scale=1.0, labels=LABELS, diffusion=DIFFUSION, **options):
    """The guided eps [5, 4]."""
    method, targets = Method(guidance=guidance, **options), jax.nn.one_hot(labels, 3)
    eps = guided(network, diffusion, method, targets, jnp.float32(scale))
    return np.asarray(eps, np.float64).reshape(5, 4)


# Along which derivative.

MIX = np.random.default_rng(2).normal(size=(4, 4)) / 2
READ = np.random.default_rng(3).normal(size=(3, 4))


class Layers(NamedTuple):
    early: Any
    late: Any


ZERO = Layers(np.zeros((5, 4)), np.zeros((5, 4)))


def layers(xp, x, perturbations):
    """Two layers; the second reads the first with its perturbation."""
    early = xp.tanh(x) + perturbations.early
    return Layers(early, xp.tanh(early @ MIX) + perturbations.late)


@functools.cache
def layered(shown: str) -> Network:
    """A network whose eps is tanh of one of its two layers; its classifier reads both."""

    def encode(x, t, perturbations=None):
        flat = x.reshape(len(x), 4)
        zeros = Layers(jnp.zeros_like(flat), jnp.zeros_like(flat))
        return layers(jnp, flat, perturbations or zeros)

    def decode(features, x, t):
        return Estimate(jnp.tanh(getattr(features, shown)).reshape(x.shape))

    def classify(features, t):
        logits = features.late @ READ.T + 0.3 * features.early[:, :3]
        return log_probabilities_of(logits, multi_label=False)

    return Network(encode, decode, classify, Layers("stem", "mid"))


def log_likelihood(x, perturbations):
    """log p(label) of each row, float64."""
    features = layers(np, x, perturbations)
    logits = features.late @ READ.T + 0.3 * features.early[:, :3]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_p[np.arange(5), np.asarray(LABELS)]


def slopes(f) -> np.ndarray:
    """Central differences [5, 4] of f: [5, 4] -> [5], row by row."""
    grad = np.zeros((5, 4))
    for i in range(4):
        h = np.zeros((5, 4))
        h[:, i] = 1e-5
        grad[:, i] = (f(h) - f(-h)) / 2e-5
    return grad


def total_derivatives(perturbations=ZERO):
    """d log p(label) / d layer [5, 4] of each layer, by finite differences."""
    early, late = perturbations
    return Layers(
        slopes(lambda h: log_likelihood(FLAT, Layers(early + h, late))),
        slopes(lambda h: log_likelihood(FLAT, Layers(early, late + h))),
    )


def norms(arrays):
    """The norm of each row [5, 1], over all arrays."""
    return np.sqrt(sum((a**2).sum(axis=1, keepdims=True) for a in arrays))


# The step size by prediction. To the decoder, features moved along the gradient are those of an
# x_t + u with u toward the class: for eps u is noise to remove, so its sign is negative.
SIZES = {"eps": -1.0, "x0": 0.5, "v": -0.05, "previous": 0.5}


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize(
    "layer, prediction", [("early", "eps"), *(("late", name) for name in PREDICTIONS)]
)
def test_representations_move_along_the_total_derivative_and_eps_as_far_as_under_pixel(
    layer, prediction, scale
):
    features, total = layers(np, FLAT, ZERO), total_derivatives()
    g = slopes(lambda h: log_likelihood(FLAT + h, ZERO))
    p = SIZES[prediction] * norms(features) / norms(total)
    shown = getattr(features, layer)
    # Through the decoder's tanh, the derivative alone would give another direction.
    change = np.tanh(shown + p * getattr(total, layer)) - np.tanh(shown)
    # The estimate of x_0 moves against the change of eps.
    sign = -np.sign((change * g).sum(axis=1, keepdims=True))
    b = np.sqrt(1 - DIFFUSION.abar[np.asarray(TIMES)])[:, None]
    step = b * norms([g]) * sign * change / norms([change])
    expected = np.tanh(shown) + scale * step
    diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
    ours = run("representation", layered(layer), scale, diffusion=diffusion)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_classifier_without_a_gradient_changes_nothing():
    network = layered("late")._replace(log_probabilities=lambda features, t: jnp.zeros((5, 3)))
    plain = run("none", network)
    np.testing.assert_array_equal(run("representation", network, scale=5.0), plain)


def test_the_toy_distinguishes_total_from_direct_derivatives():
    """If the early layer hardly affected the late one, the two would be nearly the same."""
    features = layers(np, FLAT, ZERO)

    def direct_only(h):  # the late layer stays as it is
        late = features.late - np.tanh((features.early + h) @ MIX)
        return log_likelihood(FLAT, Layers(h, late))

    assert np.abs(total_derivatives().early - slopes(direct_only)).max() > 0.1


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("layer", ["early", "late"])
def test_the_published_update_adds_a_multiple_of_the_cross_entropys_derivative(layer, scale):
    cross_entropys = -getattr(total_derivatives(), layer)
    expected = np.tanh(getattr(layers(np, FLAT, ZERO), layer) + scale * cross_entropys)
    np.testing.assert_allclose(run("published", layered(layer), scale), expected, atol=1e-4)


def test_inner_steps_follow_the_derivative_where_the_last_one_ended():
    """In float64: each of two steps covers half of the distance."""
    moved, features = ZERO, layers(np, FLAT, ZERO)
    for _ in range(2):
        slope = total_derivatives(moved)
        p = SIZES["eps"] / 2 * norms(features) / norms(slope)
        moved = Layers(*(move + p * dz for move, dz in zip(moved, slope, strict=True)))
    # The norm of the change is known from scale 1; its direction is left to compare.
    plain = np.tanh(features.late)
    change = np.tanh(features.late + moved.late) - plain
    ours = run("representation", layered("late"), inner_steps=2) - plain
    cosine = (ours * change).sum(axis=1, keepdims=True) / norms([ours]) / norms([change])
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-4)
    once = run("representation", layered("late")) - plain
    assert np.abs(once - ours).max() > 1e-3


# Which blocks.


@pytest.mark.parametrize("guidance", ["representation", "published"])
def test_only_the_named_blocks_move(guidance):
    """The decoder shows the late layer, so that a move of the early one alone changes nothing.

    Not compiled: a compiled program rounds the two decodes differently, and (14a) would scale that.
    """
    network, targets = layered("late"), jax.nn.one_hot(LABELS, 3)
    early, late = (
        guide(network, DIFFUSION, Method(guidance=guidance, blocks=blocks), targets, 2.0)(X, TIMES)
        for blocks in (("stem",), ("mid",))
    )
    plain = run("none", network)
    np.testing.assert_allclose(early.eps.reshape(5, 4), plain, atol=1e-6)
    assert np.abs(late.eps.reshape(5, 4) - plain).max() > 1e-3


def test_blocks_are_selected_by_name():
    names = Layers("stem", "mid")
    assert block_mask(names, None) is None
    assert block_mask(names, ["mid"]) == Layers(False, True)
    with pytest.raises(InvalidValue, match="^blocks='top' is unknown; known: stem, mid$"):
        block_mask(names, ["mid", "top"])
    with pytest.raises(InvalidValue, match="^blocks is empty; known: stem, mid$"):
        block_mask(names, [])
    with pytest.raises(InvalidValue, match="^blocks='top' is unknown"):
        run("representation", layered("late"), blocks=("top",))


# In which direction.


@functools.cache
def gaussian_network(diffusion: Diffusion, variance: float) -> Network:
    """The best linear decoder for N(0, variance) data, from the one representation z = x_t.

    The classifier is a soft half-space, so that grad log p is parallel to DIRECTION.
    """

    def encode(x, t, perturbations=None):
        return x if perturbations is None else x + perturbations

    def decode(z, x, t):
        a, b = diffusion.scales(t)
        spread = a**2 * variance + b**2
        c, d = diffusion.posterior_scales(t)
        gain = {
            "eps": b,
            "x0": a * variance,
            "v": a * b * (1 - variance),
            "previous": c * a * variance + d * spread,
        }[diffusion.prediction]
        return diffusion.estimate(gain / spread * z, x, t)

    def classify(z, t):
        score = (z * DIRECTION).sum(axis=(1, 2, 3))
        logits = jnp.stack([score, -score, jnp.zeros_like(score)], axis=1)
        return log_probabilities_of(logits, multi_label=False)

    return Network(encode, decode, classify)


DIRECTION = np.random.default_rng(0).uniform(-0.8, 0.8, size=SHAPE)


@pytest.mark.parametrize("variance", [0.25, 4.0])  # the sign for v differs between them
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_positive_scale_moves_the_image_toward_the_class(prediction, variance):
    diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
    network = gaussian_network(diffusion, variance)
    labels = jnp.asarray([0, 1, 0, 1, 0], jnp.int32)
    toward = np.where(np.asarray(labels)[:, None] == 0, 1, -1) * DIRECTION.ravel()
    plain = run("none", network, diffusion=diffusion)
    for scale in (2.0, -2.0):
        eps = run("representation", network, scale, labels, diffusion)
        moved = ((plain - eps) * toward).sum(axis=1)  # x_0 moves against eps
        assert (np.sign(moved) == np.sign(scale)).all()


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_the_linear_decoders_of_all_predictions_give_the_same_eps(variance):
    """Which shows that they are correct, as the test of directions assumes."""
    diffusions = [dataclasses.replace(DIFFUSION, prediction=name) for name in PREDICTIONS]
    networks = [(gaussian_network(diffusion, variance), diffusion) for diffusion in diffusions]
    estimates = [run("none", network, diffusion=diffusion) for network, diffusion in networks]
    for other in estimates[1:]:
        np.testing.assert_allclose(other, estimates[0], atol=1e-3)
