"""Guidance on small trained digits models: which way the image moves, whatever is predicted.

What counts is the image, seen by a judge that knows nothing of the network, not the classifier at
the moved features. Chance is 0.1.
"""

import subprocess
import sys

import numpy as np
import pytest

import jdm
from jdm.analysis import metrics
from jdm.data.splits import load_split

# Half the width of the digits config, and well under a minute of training each.
SMALL = ("--config.model.channels=16", "--config.train.steps=600", "--config.eval.every=0")
SAMPLE = """
import sys
import numpy as np
import jdm
from jdm.diffusion.guidance import DEFAULT_SCALES

joint, images = jdm.load(sys.argv[1]), {}
counts = {1: 200} if joint.diffusion.prediction == "v" else {1: 200, -1: 100}
for guidance in ("pixel", "representation"):
    for sign, count in counts.items():
        images[f"{guidance}{sign:+}"] = jdm.sample(
            joint,
            labels=np.arange(count) % 10,
            guidance=guidance,
            scale=sign * DEFAULT_SCALES[guidance],
            steps=20,
            eta=1.0,
            batch_size=100,
        ).images
np.savez(sys.argv[2], **images)
"""

# Each with a schedule it learns well under in so few steps; an eps estimate near pure noise, where
# the cosine schedule spends its first steps, says little about x_0.
SCHEDULES = {"eps": "linear", "x0": "cosine", "v": "cosine"}


@pytest.fixture(scope="module", params=SCHEDULES)
def prediction(request):
    return request.param


@pytest.fixture(scope="module")
def workdir(prediction, trained):
    schedule = f"--config.diffusion.schedule={SCHEDULES[prediction]}"
    return trained("digits", f"--config.diffusion.prediction={prediction}", schedule, *SMALL)


@pytest.fixture(scope="module")
def images(prediction, workdir, optimised, tmp_path_factory):
    """{guidance and sign: 200 images}, made by a process that compiles for speed."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    command = [sys.executable, "-c", SAMPLE, workdir, path]
    subprocess.run(command, env=optimised, check=True)
    with np.load(path) as saved:
        return dict(saved)


def agreement(images):
    labels = np.arange(len(images)) % 10
    judged = metrics.class_agreement(*load_split("digits", "train"), images, labels)
    return min(judged.values())


@pytest.mark.parametrize("guidance", ["pixel", "representation"])
def test_a_positive_scale_moves_the_image_toward_the_class_and_a_negative_one_away(
    prediction, images, guidance
):
    assert agreement(images[f"{guidance}+1"]) >= (0.3 if prediction == "v" else 0.7)
    if prediction != "v":
        assert agreement(images[f"{guidance}-1"]) <= 0.03


SAMPLE_WITH_ANOTHER = """
import dataclasses, sys
import jax, numpy as np
import jdm

joint = jdm.load(sys.argv[1])
head = jax.tree.map(np.zeros_like, joint.params["head"])  # its own classifier says nothing
params = joint.params | {"head": head}
joint = dataclasses.replace(joint, weights=joint.weights | {"params": params})
jdm.sample(
    joint,
    labels=np.arange(100) % 10,
    guidance="pixel",
    classifier=sys.argv[2],
    steps=20,
    eta=1.0,
    batch_size=100,
).save(sys.argv[3])
"""


def test_a_separately_trained_noisy_classifier_guides_another_network(trained, optimised, tmp_path):
    schedule = f"--config.diffusion.schedule={SCHEDULES['x0']}"
    joint = trained("digits", "--config.diffusion.prediction=x0", schedule, *SMALL)
    alone = ("--config.loss.terms=classifier", "--config.loss.classify=noised")
    noisy = trained("digits", *SMALL, schedule, *alone, "--config.train.steps=300")
    path = tmp_path / "samples.npz"
    command = [sys.executable, "-c", SAMPLE_WITH_ANOTHER, joint, noisy, path]
    subprocess.run(command, env=optimised, check=True)
    with np.load(path) as saved:
        assert agreement(saved["arr_0"]) >= 0.7


def test_classifier_learned_too(workdir):
    images, labels = load_split("digits", "validation")
    assert np.mean(jdm.classify(workdir, images).argmax(axis=1) == labels) > 0.9
