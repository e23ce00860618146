import numpy as np
import pytest

import jdm
from jdm.analysis.evaluate import classification
from jdm.data.pipeline import load_split


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
