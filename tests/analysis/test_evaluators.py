import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm import names
from jdm.analysis.evaluators import EVALUATORS, evaluate
from jdm.analysis.evaluators.base import EvaluationOptions
from jdm.config import load_config
from jdm.data.splits import Split, load_split
from jdm.diffusion.process import Diffusion
from jdm.errors import InvalidValue
from jdm.joint import Joint
from jdm.nn.model import make_model

BATCH = 64  # of all calls but one, so that each model is compiled once


@pytest.fixture(scope="module")
def joint():
    """A model with random weights."""
    config = load_config("tiny")
    model = make_model(config.model, config.exec)
    x, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32)
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), x, t), np.random.default_rng(0)
    weights = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), shapes)
    return Joint(config, model, Diffusion(**config.diffusion), {"batch_stats": {}, **weights})


@pytest.fixture(scope="module")
def split():
    images, labels = load_split("digits", "test")
    return Split(images[:100], labels[:100], "test")


def classification(joint, images, labels, batch_size=BATCH) -> dict[str, float]:
    split = Split(images, labels, "test")
    return dict(evaluate(joint, ["classification"], split, EvaluationOptions(batch_size)))


def test_every_name_has_an_evaluator_and_an_unknown_one_is_refused_at_once(joint, split):
    assert tuple(EVALUATORS) == names.EVALUATORS
    with pytest.raises(InvalidValue, match=r"^metrics='classifications' is unknown; known: "):
        evaluate(joint, ["classification", "classifications"], split, EvaluationOptions(BATCH))


def test_classification_agrees_with_classify(joint, split):
    probabilities = jdm.classify(joint, split.images, batch_size=BATCH)
    found = classification(joint, *split)
    assert found["accuracy"] == np.mean(probabilities.argmax(axis=1) == split.labels)
    picked = probabilities[np.arange(100), split.labels]
    assert found["cross_entropy"] == pytest.approx(-np.log(picked).mean(), rel=1e-5)


def test_partial_batches_and_unlabelled_images_count_right(joint, split):
    images, labels = split
    whole = classification(joint, images, labels, batch_size=100)
    assert classification(joint, images, labels) == pytest.approx(whole, rel=1e-5)
    hidden = labels.copy()
    hidden[50:] = -1
    some = classification(joint, images[:50], labels[:50])
    assert classification(joint, images, hidden) == pytest.approx(some, rel=1e-5)


def test_a_split_without_labels_is_an_error(joint, split):
    with pytest.raises(InvalidValue, match="^split='test' has no labelled image$"):
        classification(joint, split.images[:4], np.full(4, -1, np.int32))


def test_a_multi_label_model_has_a_probability_for_each_class(joint, split):
    """The same weights, with their logits read as those of ten attributes."""
    images, rng = split.images, np.random.default_rng(0)
    labels = rng.integers(-1, 2, size=(100, 10)).astype(np.int8)
    multi_label = dataclasses.replace(joint, model=joint.model.clone(multi_label=True))
    sigmoid = jdm.classify(multi_label, images, batch_size=BATCH)
    softmax = jdm.classify(joint, images, batch_size=BATCH)
    assert (sigmoid > 0).all() and (sigmoid < 1).all() and (sigmoid.sum(axis=1) > 1.5).all()
    odds = sigmoid / (1 - sigmoid)  # exp(logit)
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), softmax, rtol=1e-4)

    found = classification(multi_label, images, labels)
    known = labels >= 0
    assert found["accuracy"] == np.mean(((sigmoid > 0.5) == labels)[known])
    p = np.where(labels == 1, sigmoid, 1 - sigmoid)[known]
    assert found["cross_entropy"] == pytest.approx(-np.log(p).mean(), rel=1e-5)
