import dataclasses

import numpy as np
import pytest

import jdm
from jdm.analysis.evaluate import classification
from jdm.data.splits import load_split


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


@pytest.fixture(scope="module")
def test_split():
    return load_split("digits", "test")


def test_agrees_with_classify(joint, test_split):
    images, labels = test_split
    probabilities = jdm.classify(joint, images)
    found = dict(classification(joint, images, labels, 360))
    assert found["accuracy"] == np.mean(probabilities.argmax(axis=1) == labels)
    picked = probabilities[np.arange(len(labels)), labels]
    assert found["cross_entropy"] == pytest.approx(-np.log(picked).mean(), rel=1e-5)


def test_partial_batches_and_unlabelled_images_count_right(joint, test_split):
    images, labels = test_split
    whole = dict(classification(joint, images[:100], labels[:100], 100))
    parts = dict(classification(joint, images[:100], labels[:100], 64))
    assert parts == pytest.approx(whole, rel=1e-5)
    hidden = labels[:100].copy()
    hidden[50:] = -1
    some = dict(classification(joint, images[:100], hidden, 64))
    assert some == pytest.approx(
        dict(classification(joint, images[:50], labels[:50], 50)), rel=1e-5
    )


def test_no_label_is_an_error(joint, test_split):
    with pytest.raises(ValueError, match="no image"):
        dict(classification(joint, test_split[0][:4], np.full(4, -1, np.int32), 4))


def test_a_multi_label_model_answers_for_each_class(joint, test_split):
    """The same weights read as ten answers to each image."""
    images, rng = test_split[0][:100], np.random.default_rng(0)
    labels = rng.integers(-1, 2, size=(100, 10)).astype(np.int8)
    many = dataclasses.replace(joint, model=joint.model.clone(multi_label=True))
    answers = jdm.classify(many, images, batch_size=64)
    shares = jdm.classify(joint, images, batch_size=64)
    assert (answers > 0).all() and (answers < 1).all() and (answers.sum(axis=1) > 1.5).all()
    odds = answers / (1 - answers)  # exp(logit), whose softmax the other model takes
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), shares, rtol=1e-4)

    found = dict(classification(many, images, labels, 64))
    known = labels >= 0
    assert found["accuracy"] == np.mean(((answers > 0.5) == labels)[known])
    p = np.where(labels == 1, answers, 1 - answers)[known]
    assert found["cross_entropy"] == pytest.approx(-np.log(p).mean(), rel=1e-5)
