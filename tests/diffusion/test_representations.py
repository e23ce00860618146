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


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("layer", ["early", "late"])
def test_representations_move_along_their_total_derivatives_as_far_as_the_image_in_log_p(
    layer, scale
):
    g = slopes(lambda h: log_likelihood(FLAT + h, ZERO))
    total = total_derivatives()
    b = np.sqrt(1 - DIFFUSION.abar[np.asarray(TIMES)])[:, None]
    shift = scale * np.sqrt(4) * g  # the image has four values
    increase = (shift * g).sum(axis=1, keepdims=True)
    squares = np.mean([(x**2).sum(axis=1, keepdims=True) for x in total], axis=0)
    moved = getattr(layers(np, FLAT, ZERO), layer) + increase / squares * getattr(total, layer)
    expected = np.tanh(moved) - shift / b
    np.testing.assert_allclose(run("representation", layered(layer), scale), expected, atol=1e-4)


def test_the_units_of_the_representations_make_no_difference():
    """All of them as numbers that are 100 times as large."""
    network = layered("early")

    def smaller(features):
        return jax.tree.map(lambda z: z / 100, features)

    def encode(x, t, perturbations=None):
        features = network.encode(x, t, perturbations and smaller(perturbations))
        return jax.tree.map(lambda z: z * 100, features)

    other = Network(
        encode,
        lambda features, x, t: network.decode(smaller(features), x, t),
        lambda features, t: network.log_probabilities(smaller(features), t),
        network.block_names,
    )
    expected = run("representation", network)
    np.testing.assert_allclose(run("representation", other), expected, atol=1e-5)
    assert np.abs(expected - run("pixel", network)).max() > 1e-2  # something was moved


def test_a_classifier_without_a_gradient_changes_nothing():
    network = layered("late")._replace(log_probabilities=lambda features, t: jnp.zeros((5, 3)))
    plain = run("none", network)
    np.testing.assert_allclose(run("representation", network, scale=5.0), plain, atol=1e-6)


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


# Which blocks.


@pytest.mark.parametrize("guidance", ["representation", "published"])
def test_only_the_named_blocks_move(guidance):
    """The decoder shows the late layer, so that a move of the early one alone leaves what x_t adds
    under `representation`: - u / sqrt(1 - abar_t). Of that, pixel guidance at sqrt(N) = 2 times
    the scale subtracts the (1 - abar_t)-fold."""
    network, plain = layered("late"), run("none", layered("late"))
    if guidance == "representation":
        pixel = run("pixel", network, 2.0 * np.sqrt(4)) - plain
        plain = plain + pixel / (1 - DIFFUSION.abar[np.asarray(TIMES)])[:, None]
    early, late = (run(guidance, network, 2.0, blocks=blocks) for blocks in (("stem",), ("mid",)))
    np.testing.assert_allclose(early, plain, rtol=1e-4, atol=1e-5)
    assert np.abs(late - plain).max() > 1e-3


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


# Which way, and how far, where the answer is known.


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


@pytest.mark.parametrize("variance", [0.25, 4.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_linear_networks_image_moves_along_the_gradient_whatever_is_predicted(
    prediction, variance
):
    """Here P = u, so that the estimate of x_0 is that of x_t + u: it moves by dx_0/dx_t u, which is
    abar v / (abar v + 1 - abar) / (1 - abar) times the change under pixel guidance, at sqrt(N) = 2
    times the scale."""
    diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
    network = gaussian_network(diffusion, variance)
    labels = jnp.asarray([0, 1, 0, 1, 0], jnp.int32)
    abar = diffusion.abar[np.asarray(TIMES)][:, None]
    times = abar * variance / (abar * variance + 1 - abar) / (1 - abar)
    plain = run("none", network, diffusion=diffusion)
    for scale in (2.0, -2.0):
        pixel = run("pixel", network, scale * np.sqrt(4), labels, diffusion)
        expected = plain + times * (pixel - plain)
        ours = run("representation", network, scale, labels, diffusion)
        np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=2e-4)
        assert np.abs(expected - plain).max() > 0.02


@pytest.mark.parametrize("side", [1, 3])
def test_the_scale_counts_in_lengths_of_noise(side):
    """With a classifier that is linear in x_t and decodes nothing, only - u / sqrt(1 - abar_t) is
    left, and u = s sqrt(N) g."""
    x = jnp.ones((5, side, side, 1))

    def classify(z, t):
        score = z.sum(axis=(1, 2, 3))
        return jnp.stack([score, -score, jnp.zeros_like(score)], axis=1)

    network = Network(
        lambda x, t, moved=None: x if moved is None else x + moved,
        lambda z, x, t: Estimate(jnp.zeros_like(x)),
        classify,
    )
    targets, method = jax.nn.one_hot(jnp.zeros(5, int), 3), Method(guidance="representation")
    eps = guide(network, DIFFUSION, method, targets, 0.7)(x, TIMES).eps
    b = np.sqrt(1 - DIFFUSION.abar[np.asarray(TIMES)])[:, None, None, None]
    np.testing.assert_allclose(eps, np.broadcast_to(-0.7 * side / b, x.shape), rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_estimate_of_x0_and_that_of_eps_agree(prediction):
    diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
    method, targets = Method(guidance="representation"), jax.nn.one_hot(LABELS, 3)
    estimate = guide(gaussian_network(diffusion, 0.25), diffusion, method, targets, 2.0)(X, TIMES)
    x0 = diffusion.x0_of(estimate, X, TIMES)
    np.testing.assert_allclose(diffusion.eps_from_x0(X, TIMES, x0), estimate.eps, atol=1e-3)


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_the_linear_decoders_of_all_predictions_give_the_same_eps(variance):
    """Which shows that they are correct, as the test of directions assumes."""
    diffusions = [dataclasses.replace(DIFFUSION, prediction=name) for name in PREDICTIONS]
    networks = [(gaussian_network(diffusion, variance), diffusion) for diffusion in diffusions]
    estimates = [run("none", network, diffusion=diffusion) for network, diffusion in networks]
    for other in estimates[1:]:
        np.testing.assert_allclose(other, estimates[0], atol=1e-3)
