"""Out-of-distribution detection, and distances to training images."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from scipy.special import expit, softmax

from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.analysis.evaluators.likelihood import image_bounds
from jdm.analysis.evaluators.ood import energy, max_probability, separation
from jdm.analysis.features import features
from jdm.analysis.logits import image_logits
from jdm.analysis.novelty import NEIGHBOURS, Novelty
from jdm.config import load_config
from jdm.data.splits import Split, load_split
from jdm.diffusion.process import Diffusion
from jdm.errors import InvalidValue
from jdm.joint import Joint
from jdm.nn.model import make_model, weight_shapes

BATCH = 64  # of all calls, so that each program is compiled once


@pytest.fixture(scope="module")
def joint():
    """A model with random weights and few noise levels."""
    config = load_config("tiny")
    model, rng = make_model(config.model, config.exec), np.random.default_rng(0)
    weights = jax.tree.map(
        lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), weight_shapes(model)
    )
    return Joint(config, model, Diffusion(4, "cosine"), {"batch_stats": {}, **weights})


@pytest.fixture(scope="module")
def train():
    return Split(load_split("digits", "train").images[:120], np.zeros(120, np.int32), "train")


@pytest.fixture(scope="module")
def split():
    images, labels = load_split("digits", "test")
    return Split(images[:60], labels[:60], "test")


@pytest.fixture(scope="module")
def other(split):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)
    return Split(images, np.full(50, -1, np.int32), "test")


@pytest.fixture(scope="module")
def novelty(joint, train):
    return Novelty.fit(joint, train.images, batch_size=BATCH)


def test_scores_of_logits_are_their_formulas():
    logits = np.random.default_rng(0).normal(0, 3, (20, 5))
    p, q = softmax(logits, axis=1), expit(logits)
    np.testing.assert_allclose(max_probability(logits, False), -np.log(p.max(axis=1)))
    np.testing.assert_allclose(energy(logits, False), -np.log(np.exp(logits).sum(axis=1)))
    sure = np.log(np.maximum(q, 1 - q)).sum(axis=1)
    np.testing.assert_allclose(max_probability(logits, True), -sure)
    np.testing.assert_allclose(energy(logits, True), np.log(1 - q).sum(axis=1))


def test_separation_is_the_share_of_pairs_in_the_right_order():
    within, outside = np.array([0.0, 1.0, 1.0, 3.0]), np.array([1.0, 2.0])
    pairs = [(a < b) + 0.5 * (a == b) for a, b in itertools.product(within, outside)]
    assert separation(within, outside) == pytest.approx(np.mean(pairs))


def test_each_score_tells_the_other_images_from_the_split(joint, train, split, other, novelty):
    options = EvaluationOptions(
        BATCH, load=lambda name: {"train": train}[name], other=other, bound_steps=2
    )
    found = dict(evaluate(joint, ["ood"], split, options))
    bounds, logits = [], []
    for images in (split.images, other.images):
        bounds.append(image_bounds(joint, images, 2, batch_size=BATCH).per_image)
        logits.append(image_logits(joint, images, BATCH).astype(np.float64))
    assert found == {
        "auroc/max_probability": separation(*(max_probability(x, False) for x in logits)),
        "auroc/energy": separation(*(energy(x, False) for x in logits)),
        "auroc/bound": separation(*bounds),
        "auroc/features": separation(*map(novelty.distances, (split.images, other.images))),
    }
    assert all(type(value) is float for value in found.values())
    assert found["auroc/features"] > 0.9  # noise, even in the features of a random network

    config = joint.config.copy_and_resolve_references()
    config.loss.terms = ("diffusion",)
    no_classifier = dict(
        evaluate(dataclasses.replace(joint, config=config), ["ood"], split, options)
    )
    names = ["auroc/bound", "auroc/features"]
    assert no_classifier == {name: found[name] for name in names}


def test_images_of_the_same_kind_are_not_told_apart(joint, train, split):
    more = Split(load_split("digits", "test").images[60:160], np.zeros(100, np.int32), "test")
    options = EvaluationOptions(BATCH, load=lambda name: train, other=more, bound_steps=2)
    found = dict(evaluate(joint, ["ood"], split, options))
    assert all(0.3 < value < 0.7 for value in found.values()), found


def test_distances_are_to_the_nearest_other_training_images(joint, train, split, novelty):
    names = ("stem", "encoder_0_0", "down_0", "encoder_1_0", "mid")
    known, found = (
        features(joint, images, 0, names, batch_size=BATCH).values.astype(np.float64)
        for images in (train.images, split.images)
    )
    mean, scale = known.mean(axis=0), known.std(axis=0)

    def distances(a):
        difference = ((a - mean) / scale)[:, None] - (known - mean) / scale
        return np.sort(np.sqrt((difference**2).sum(axis=2)), axis=1)

    expected = distances(found)[:, NEIGHBOURS - 1]
    np.testing.assert_allclose(novelty.distances(split.images), expected, rtol=1e-5)
    leave_one_out = np.sort(distances(known)[:, NEIGHBOURS])  # the nearest is the image itself
    np.testing.assert_allclose(novelty.training, leave_one_out, rtol=1e-5)
    assert novelty.distances(split.images[:0]).shape == (0,)


def test_thresholds_and_percentiles_are_those_of_the_training_images(novelty):
    limit = novelty.threshold(0.9)
    assert np.mean(novelty.training <= limit) == pytest.approx(0.9, abs=0.01)
    assert novelty.threshold() == np.quantile(novelty.training, 0.99)
    ends = np.array([0, novelty.training[59], novelty.training[-1] + 1])
    np.testing.assert_allclose(novelty.percentiles(ends), [0, 50, 100])


def test_at_most_a_number_of_training_images_is_drawn_by_the_seed(joint, train, monkeypatch):
    monkeypatch.setattr("jdm.analysis.novelty.IMAGES", 40)
    one, same, other = (
        Novelty.fit(joint, train.images, seed=seed, batch_size=BATCH).training for seed in (0, 0, 1)
    )
    assert len(one) == 40
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_wrong_values_are_refused(joint, train, split, other):
    def run(other, load=lambda name: train, split=split):
        options = EvaluationOptions(BATCH, load=load, other=other)
        return list(evaluate(joint, ["ood"], split, options))

    with pytest.raises(InvalidValue, match="^metrics='ood' needs a second data set, whose images"):
        run(None)
    large = Split(np.zeros((5, 28, 28, 3), np.uint8), np.zeros(5, np.int32), "test")
    with pytest.raises(InvalidValue, match="^other has 5 images of 28×28×3; this model takes 8×8×"):
        run(large)
    with pytest.raises(InvalidValue, match="^other has no image$"):
        run(Split(other.images[:0], other.labels[:0], "test"))
    with pytest.raises(InvalidValue, match="^metrics='ood' needs the split 'train'"):
        run(other, load=None)
    with pytest.raises(InvalidValue, match="^split='test' has no image$"):
        run(other, split=Split(split.images[:0], split.labels[:0], "test"))
    with pytest.raises(InvalidValue, match="^train_images are 5; there must be more than 5$"):
        Novelty.fit(joint, train.images[:5])
