"""jdm.diffusion.guidance on toy networks whose answer is known in closed form.

How far guidance moves the images of trained networks is tested in tests/test_digits_models.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.diffusion.guidance import (
    DEFAULT_SCALES,
    GUIDANCE,
    REACH,
    SCALE_SCHEDULES,
    Network,
    answers,
    block_mask,
    guide,
)
from jdm.diffusion.process import PREDICTIONS, Diffusion, Estimate
from jdm.diffusion.samplers import sample

DIFFUSION = Diffusion(200)
SHAPE = (2, 2, 1)
TIMES = jnp.asarray([0, 20, 60, 120, 199], jnp.int32)
LABELS = jnp.asarray([0, 1, 2, 1, 0], jnp.int32)
# Data: three equally likely classes, each a Gaussian around an image of its own.
CENTRES = np.random.default_rng(0).uniform(-0.8, 0.8, size=(3, *SHAPE))
VARIANCE = 0.15


def noise(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = noise(1, 5, *SHAPE)


def run(
    guidance: str,
    network: Network,
    labels=LABELS,
    scale=1.0,
    x=X,
    t=TIMES,
    diffusion=DIFFUSION,
    **options,
):
    """The guided estimate, compiled once for all scales. labels: of 3 classes, or weights."""
    targets = None if labels is None else jnp.asarray(labels)
    if targets is not None and targets.ndim == 1:
        targets = jax.nn.one_hot(targets, 3)  # -1: a row of zeros
    options = tuple(options.items())
    return guided(guidance, network, diffusion, targets, jnp.float32(scale), x, t, options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 7))
def guided(guidance, network, diffusion, targets, scale, x, t, options):
    return guide(network, diffusion, guidance, targets, scale, **dict(options))(x, t)


# A mixture of Gaussians: the exact noise estimate and the exact classifier, in float64.


def class_scores(x, abar):
    """log p(x_t | class) up to a constant [B, K], of float64 x [B, ...] and abar [B]."""
    variance = abar * VARIANCE + 1 - abar
    offsets = x[:, None] - np.sqrt(abar)[:, None, None, None, None] * CENTRES
    return -(offsets**2).sum(axis=(2, 3, 4)) / (2 * variance[:, None])


def class_eps(x, abar):
    """E[eps | x_t, class] [B, K, ...]."""
    wide = abar[:, None, None, None, None]
    variance = wide * VARIANCE + 1 - wide
    return np.sqrt(1 - wide) * (x[:, None] - np.sqrt(wide) * CENTRES) / variance


@functools.cache
def mixture(diffusion: Diffusion) -> Network:
    """The same in JAX, split as a network is: features, from which both are read."""

    def parts(features, t):
        abar = jnp.asarray(diffusion.abar, jnp.float32)[t]
        scores = -features["distance"] / (2 * (abar * VARIANCE + 1 - abar)[:, None])
        return abar[:, None, None, None, None], scores

    def encode(x, t, nudges=None):
        image = x if nudges is None else x + nudges["image"]
        a = jnp.sqrt(jnp.asarray(diffusion.abar, jnp.float32)[t])
        offsets = image[:, None] - a[:, None, None, None, None] * CENTRES
        distance = (offsets**2).sum(axis=(2, 3, 4))
        return {
            "image": image,
            "distance": distance if nudges is None else distance + nudges["distance"],
        }

    def decode(features, x, t):
        abar, scores = parts(features, t)
        shares = jax.nn.softmax(scores)[:, :, None, None, None]
        offsets = features["image"][:, None] - jnp.sqrt(abar) * CENTRES
        eps = jnp.sqrt(1 - abar) * offsets / (abar * VARIANCE + 1 - abar)
        return Estimate((shares * eps).sum(axis=1), jnp.tanh(features["image"]))

    return Network(encode, decode, lambda z, t: jax.nn.log_softmax(parts(z, t)[1]))


def numbers():
    x, abar = np.asarray(X, np.float64), DIFFUSION.abar[np.asarray(TIMES)]
    scores = class_scores(x, abar)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    each = class_eps(x, abar)
    return shares, each, (shares[:, :, None, None, None] * each).sum(axis=1)


def test_none_is_the_network():
    estimate = run("none", mixture(DIFFUSION), labels=None)
    np.testing.assert_allclose(estimate.eps, numbers()[2], atol=1e-4)
    np.testing.assert_allclose(estimate.log_variance, np.tanh(X), atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.5, -1.0, 0.0])
def test_pixel_takes_from_eps_the_gradient_of_the_classifier(scale):
    shares, each, eps = numbers()
    # grad log p(y | x) = grad log p(x | y) - grad log p(x), and eps = -sqrt(1 - abar) grad log p.
    asked = each[np.arange(5), np.asarray(LABELS)]
    estimate = run("pixel", mixture(DIFFUSION), scale=scale)
    np.testing.assert_allclose(estimate.eps, eps + scale * (asked - eps), atol=2e-4)


def test_pixel_at_scale_one_samples_the_asked_class():
    labels = jnp.arange(3, dtype=jnp.int32).repeat(400)
    diffusion = Diffusion(200, variance="fixed_small")
    eps_fn = guide(mixture(diffusion), diffusion, "pixel", jax.nn.one_hot(labels, 3), 1.0)
    keys = jax.vmap(jax.random.key)(np.arange(1200))
    draw = jax.jit(lambda keys: sample(eps_fn, diffusion, keys, SHAPE, steps=200, threshold="none"))
    images = np.asarray(draw(keys)).reshape(3, 400, *SHAPE)
    # 400 draws: 5 % of the deviation is one standard error of the mean, 3.5 % of the deviation;
    # 200 steps make it about 4 % too small.
    deviation = np.sqrt(VARIANCE)
    np.testing.assert_allclose(images.mean(axis=1), CENTRES, atol=0.2 * deviation)
    np.testing.assert_allclose(images.std(axis=1), deviation, rtol=0.18)


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_guidance_leaves_the_variance_alone(guidance):
    estimate = run(guidance, mixture(DIFFUSION), scale=3.0)
    assert np.abs(estimate.eps - run("none", mixture(DIFFUSION), labels=None).eps).max() > 0.1
    np.testing.assert_allclose(estimate.log_variance, np.tanh(X), atol=1e-6)


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_a_network_without_learned_variance_has_none_under_guidance(guidance):
    network = mixture(DIFFUSION)
    fixed = network._replace(decode=lambda f, x, t: Estimate(network.decode(f, x, t).eps))
    assert run(guidance, fixed).log_variance is None


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_rows_are_guided_each_for_itself(guidance):
    network = mixture(DIFFUSION)
    whole = run(guidance, network)
    one = run(guidance, network, labels=LABELS[2:3], x=X[2:3], t=TIMES[2:3])
    np.testing.assert_allclose(one.eps[0], whole.eps[2], atol=1e-5)
    other = run(guidance, network, labels=LABELS.at[0].set(2))
    np.testing.assert_allclose(other.eps[1:], whole.eps[1:], atol=1e-6)
    assert np.abs(other.eps[0] - whole.eps[0]).max() > 1e-3


# Representation guidance: which derivative.

MIX = np.random.default_rng(2).normal(size=(4, 4)) / 2
READ = np.random.default_rng(3).normal(size=(3, 4))


def layers(xp, x, nudges):
    """Two layers, the second made from the first; each takes its nudge before it is read."""
    early = xp.tanh(x) + nudges["early"]
    late = xp.tanh(early @ MIX) + nudges["late"]
    return {"early": early, "late": late}


@functools.cache
def layered(shown: str) -> Network:
    """A network whose eps is one of its two layers as the decoder got it, and its class too.

    The decoder takes the layer with a minus, as one that predicts noise does.
    """

    def encode(x, t, nudges=None):
        flat = x.reshape(len(x), 4)
        zeros = {"early": jnp.zeros_like(flat), "late": jnp.zeros_like(flat)}
        return layers(jnp, flat, nudges or zeros)

    def decode(features, x, t):
        return Estimate(jnp.tanh(features[shown]).reshape(x.shape))

    def classify(features, t):
        return answers(features["late"] @ READ.T + 0.3 * features["early"][:, :3], False)

    return Network(encode, decode, classify)


def log_likelihood(x, nudges):
    """log p(label) of each row, float64."""
    features = layers(np, x, nudges)
    logits = features["late"] @ READ.T + 0.3 * features["early"][:, :3]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_p[np.arange(5), np.asarray(LABELS)]


def slopes(f, shape) -> np.ndarray:
    """Central differences of f: [5, 4] -> [5], row by row."""
    grad = np.zeros(shape)
    for i in range(shape[1]):
        h = np.zeros(shape)
        h[:, i] = 1e-5
        grad[:, i] = (f(h) - f(-h)) / 2e-5
    return grad


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("layer", ["early", "late"])
def test_representations_move_along_the_total_derivative_and_eps_as_far_as_under_pixel(
    layer, scale
):
    """By finite differences: the path from the early layer through the late one counts too."""
    x = np.asarray(X, np.float64).reshape(5, 4)
    zero = {"early": np.zeros((5, 4)), "late": np.zeros((5, 4))}
    total = {
        name: slopes(lambda h, name=name: log_likelihood(x, zero | {name: h}), (5, 4))
        for name in zero
    }
    toward = slopes(lambda h: log_likelihood(x + h, zero), (5, 4))
    features = layers(np, x, zero)

    def length(*arrays):
        return np.sqrt(sum((a**2).sum(axis=1, keepdims=True) for a in arrays))

    p = REACH["eps"] * length(*features.values()) / length(*total.values())
    # The decoder shows one layer through a tanh, so that the derivative alone would not do.
    change = np.tanh(features[layer] + p * total[layer]) - np.tanh(features[layer])
    # eps + d moves the estimate of x_0 along -d.
    sense = -np.sign((change * toward).sum(axis=1, keepdims=True))
    b = np.sqrt(1 - DIFFUSION.abar[np.asarray(TIMES)])[:, None]
    expected = np.tanh(features[layer]) + scale * b * length(toward) * sense * change / length(
        change
    )
    ours = run("representation", layered(layer), scale=scale)
    np.testing.assert_allclose(ours.eps.reshape(5, 4), expected, atol=1e-4)


def test_a_classifier_without_an_opinion_changes_nothing():
    network = layered("late")._replace(log_probabilities=lambda features, t: jnp.zeros((5, 3)))
    plain = run("none", network)
    np.testing.assert_array_equal(run("representation", network, scale=5.0).eps, plain.eps)


def test_the_toy_tells_total_from_direct_derivatives():
    """What the test above would not see if the early layer had little effect on the late one."""
    x = np.asarray(X, np.float64).reshape(5, 4)
    zero = {"early": np.zeros((5, 4)), "late": np.zeros((5, 4))}
    total = slopes(lambda h: log_likelihood(x, zero | {"early": h}), (5, 4))
    features = layers(np, x, zero)

    def direct_only(h):  # the late layer stays as it is
        late = features["late"] - np.tanh((features["early"] + h) @ MIX)
        return log_likelihood(x, {"early": h, "late": late})

    assert np.abs(total - slopes(direct_only, (5, 4))).max() > 0.1


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("layer", ["early", "late"])
def test_the_published_update_adds_a_multiple_of_the_cross_entropys_derivative(layer, scale):
    x = np.asarray(X, np.float64).reshape(5, 4)
    zero = {"early": np.zeros((5, 4)), "late": np.zeros((5, 4))}
    total = slopes(lambda h: -log_likelihood(x, zero | {layer: h}), (5, 4))
    expected = np.tanh(layers(np, x, zero)[layer] + scale * total)
    ours = run("published", layered(layer), scale=scale)
    np.testing.assert_allclose(ours.eps.reshape(5, 4), expected, atol=1e-4)


# Representation guidance: which way.


@functools.cache
def gaussian_network(diffusion: Diffusion, variance: float) -> Network:
    """The best linear decoder for N(0, variance) data, reading the one representation z = x_t.

    The class is a soft half-space, so that grad log p is known to point along one image.
    """

    def encode(x, t, nudges=None):
        return x if nudges is None else x + nudges

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
        score = (z * CENTRES[0]).sum(axis=(1, 2, 3))
        return answers(jnp.stack([score, -score, jnp.zeros_like(score)], axis=1), False)

    return Network(encode, decode, classify)


def noise_estimate(guidance, network, diffusion, labels=None, scale=0.0):
    estimate = run(guidance, network, labels, scale, diffusion=diffusion)
    return np.asarray(estimate.eps, np.float64)


@pytest.mark.parametrize("variance", [0.25, 4.0])  # v flips sense between them
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_positive_scale_moves_the_image_toward_the_class(prediction, variance):
    diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
    network = gaussian_network(diffusion, variance)
    labels = jnp.asarray([0, 1, 0, 1, 0], jnp.int32)
    toward = np.where(np.asarray(labels)[:, None, None, None] == 0, 1, -1) * CENTRES[0]
    a, b = (np.asarray(q, np.float64) for q in diffusion.scales(TIMES))
    plain = noise_estimate("none", network, diffusion)
    for scale in (2.0, -2.0):
        eps = noise_estimate("representation", network, diffusion, labels, scale)
        moved = (-b / a * (eps - plain) * toward).sum(axis=(1, 2, 3))
        assert (np.sign(moved) == np.sign(scale)).all()


def test_the_best_decoders_are_the_best():
    """They are what the sign test stands on: all give the noise estimate that eps gives."""
    for variance in (0.25, 4.0):
        estimates = []
        for prediction in PREDICTIONS:
            diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
            network = gaussian_network(diffusion, variance)
            estimates.append(noise_estimate("none", network, diffusion))
        for other in estimates[1:]:
            np.testing.assert_allclose(other, estimates[0], atol=1e-3)


def test_every_guidance_has_a_default_scale():
    assert list(DEFAULT_SCALES) == list(GUIDANCE)
    assert all(scale > 0 for name, scale in DEFAULT_SCALES.items() if name != "none")


# What is leaned toward, and how strongly.


@pytest.mark.parametrize("guidance", [name for name in GUIDANCE if name != "none"])
def test_a_row_of_zeros_is_not_guided(guidance):
    network = layered("late")
    mixed = np.asarray(
        run(guidance, network, labels=LABELS.at[1].set(-1).at[4].set(-1), scale=2.0).eps
    )
    guided = np.asarray(run(guidance, network, scale=2.0).eps)
    plain = np.asarray(run("none", network).eps)
    np.testing.assert_allclose(mixed[[1, 4]], plain[[1, 4]], atol=1e-6)
    np.testing.assert_allclose(mixed[[0, 2, 3]], guided[[0, 2, 3]], atol=1e-6)
    assert np.abs(guided[[1, 4]] - plain[[1, 4]]).max() > 1e-3


def test_a_distribution_weighs_the_gradients_of_its_classes():
    weights = np.random.default_rng(4).dirichlet([1, 1, 1], size=5)
    _, each, eps = numbers()
    toward = (weights[:, :, None, None, None] * each).sum(axis=1)
    ours = run("pixel", mixture(DIFFUSION), labels=jnp.asarray(weights, jnp.float32), scale=2.0)
    np.testing.assert_allclose(ours.eps, eps + 2 * (toward - eps), atol=4e-4)


def test_the_answers_of_a_model_that_knows_several_labels():
    logits = jnp.asarray([[2.0, -1.0], [0.0, 30.0]])
    yes, no = np.split(np.exp(np.asarray(answers(logits, True), np.float64)), 2, axis=1)
    np.testing.assert_allclose(yes, 1 / (1 + np.exp(-np.asarray(logits, np.float64))), rtol=1e-5)
    np.testing.assert_allclose(no, 1 / (1 + np.exp(np.asarray(logits, np.float64))), rtol=1e-4)
    one = np.exp(np.asarray(answers(logits, False)))
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-5)


def test_both_is_the_mean_of_pixel_and_representation():
    network = layered("late")
    estimates = [run(name, network, scale=3.0).eps for name in ("both", "pixel", "representation")]
    np.testing.assert_allclose(estimates[0], (estimates[1] + estimates[2]) / 2, atol=1e-5)
    assert np.abs(estimates[1] - estimates[2]).max() > 0.01


@pytest.mark.parametrize("guidance", ["representation", "published"])
def test_only_the_blocks_that_are_named_move(guidance):
    """The decoder shows the late layer: with the early one alone moving, it shows nothing new."""
    network, plain = layered("late"), run("none", layered("late"))
    targets = jax.nn.one_hot(LABELS, 3)
    early, late = (
        guide(network, DIFFUSION, guidance, targets, 2.0, blocks=blocks)(X, TIMES)
        for blocks in ({"early": True, "late": False}, {"early": False, "late": True})
    )
    np.testing.assert_allclose(early.eps, plain.eps, atol=1e-6)
    assert np.abs(late.eps - plain.eps).max() > 1e-3


def test_blocks_are_chosen_by_name():
    names = {"early": "stem", "late": "mid"}
    assert block_mask(names, None) is None
    assert block_mask(names, ["mid"]) == {"early": False, "late": True}
    with pytest.raises(ValueError, match="^blocks='top' is unknown; known: stem, mid$"):
        block_mask(names, ["mid", "top"])
    with pytest.raises(ValueError, match="^blocks is empty"):
        block_mask(names, [])


def test_inner_steps_follow_the_derivative_where_the_last_one_ended():
    """By hand, in float64: each goes half of the stretch."""
    x = np.asarray(X, np.float64).reshape(5, 4)
    moved = {"early": np.zeros((5, 4)), "late": np.zeros((5, 4))}
    features = layers(np, x, moved)

    def length(arrays):
        return np.sqrt(sum((a**2).sum(axis=1, keepdims=True) for a in arrays.values()))

    def slope_at(moved, name):
        return slopes(lambda h: log_likelihood(x, moved | {name: moved[name] + h}), (5, 4))

    for _ in range(2):
        slope = {name: slope_at(moved, name) for name in moved}
        p = REACH["eps"] / 2 * length(features) / length(slope)
        moved = {name: moved[name] + p * slope[name] for name in moved}
    # With scale 1 and the change of known length, its direction is what is left to compare.
    change = np.tanh(features["late"] + moved["late"]) - np.tanh(features["late"])
    plain = np.tanh(features["late"])
    ours = run("representation", layered("late"), inner_steps=2).eps.reshape(5, 4) - plain
    cosine = (ours * change).sum(axis=1) / np.linalg.norm(ours, axis=1)
    np.testing.assert_allclose(np.abs(cosine) / np.linalg.norm(change, axis=1), 1, atol=1e-4)
    once = run("representation", layered("late")).eps.reshape(5, 4) - plain
    assert np.abs(once - ours).max() > 1e-3


@pytest.mark.parametrize("schedule", SCALE_SCHEDULES)
def test_a_schedule_of_the_scale_is_1_in_the_mean(schedule):
    u = jnp.linspace(0, 1, 1001)
    assert SCALE_SCHEDULES[schedule](u).mean() == pytest.approx(1, abs=2e-3)
    # The times of X are 0 to 199 of 200, so u is 0 to 1.
    factors = np.asarray(SCALE_SCHEDULES[schedule](TIMES / 199))
    network, plain = layered("late"), run("none", layered("late")).eps
    for name in ("pixel", "representation"):
        constant = run(name, network, scale=2.0).eps - plain
        ours = run(name, network, scale=2.0, schedule=schedule).eps - plain
        np.testing.assert_allclose(ours, factors[:, None, None, None] * constant, atol=1e-5)


def test_unknown_names_are_one_sentence():
    with pytest.raises(ValueError, match="^guidance='clip' is unknown; known: none, pixel, repre"):
        guide(layered("late"), DIFFUSION, "clip", None, 1.0)
    with pytest.raises(ValueError, match="^scale_schedule='up' is unknown; known: constant, early"):
        guide(layered("late"), DIFFUSION, "pixel", None, 1.0, schedule="up")
