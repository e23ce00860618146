"""Guidance on small trained digits models: which way the image moves, whatever is predicted.

What counts is the image, seen by a judge that knows nothing of the network, not the classifier at
the moved features. Chance is 0.1.
"""

import numpy as np
import pytest

import jdm
from jdm.analysis import metrics
from jdm.data.pipeline import load_split

# At most a minute of training each.
SHORT = ("--config.train.steps=300", "--config.optim.warmup_steps=50", "--config.eval.every=0")
LABELS = np.arange(200) % 10


@pytest.fixture(scope="module", params=["eps", "x0", "v"])
def joint(request, trained):
    return jdm.load(trained("digits", f"--config.diffusion.prediction={request.param}", *SHORT))


def agreement(joint, guidance, sign=1):
    from jdm.diffusion.guidance import DEFAULT_SCALES

    scale = sign * DEFAULT_SCALES[guidance]
    samples = jdm.sample(
        joint, labels=LABELS, guidance=guidance, scale=scale, steps=20, eta=1.0, batch_size=200
    )
    judged = metrics.class_agreement(*load_split("digits", "train"), samples.images, LABELS)
    return min(judged.values())


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_a_positive_scale_moves_the_image_toward_the_class_and_a_negative_one_away(joint, guidance):
    prediction = joint.diffusion.prediction
    assert agreement(joint, guidance) >= (0.3 if prediction == "v" else 0.7)
    if prediction != "v":
        assert agreement(joint, guidance, sign=-1) <= 0.03


def test_classifier_learned_too(joint):
    images, labels = load_split("digits", "validation")
    assert np.mean(jdm.classify(joint, images).argmax(axis=1) == labels) > 0.9
