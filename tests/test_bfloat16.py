"""Training and sampling in bfloat16, against float32: near, and not the same."""

import jax
import numpy as np
import pytest

import jdm
from jdm.config import load_config
from jdm.tracking import read_metrics
from jdm.trainer import train

# The relative rounding error of bfloat16; a loss is a mean of many rounded numbers.
ROUNDING = 2**-8


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    """The metrics of two steps, in float32 and in bfloat16."""
    workdir = tmp_path_factory.mktemp("half")
    train(load_config("tiny", ["--config.exec.dtype=bfloat16", "--config.train.steps=2"]), workdir)
    weights = jdm.load(workdir).weights
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(weights))
    return read_metrics(tiny)[:2], read_metrics(workdir)


@pytest.mark.parametrize("name", ["loss", "diffusion", "cross_entropy", "gradient_norm"])
def test_the_losses_of_two_steps_are_near_those_of_float32(rows, name):
    full, half = (np.array([row[f"train/{name}"] for row in one]) for one in rows)
    np.testing.assert_allclose(half, full, rtol=ROUNDING)
    assert half[1] != full[1]  # at first the decoder's output is 0 in both


def both(path):
    """The model in float32 and in bfloat16."""
    return [jdm.load(path, dtype=dtype) for dtype in ("float32", "bfloat16")]


def test_images_are_near_those_of_float32(tiny):
    """By less than a pixel level on average, after four steps with noise."""
    options = dict(labels=[3], sampler="ancestral", steps=4)
    full, half = (jdm.sample(joint, seeds=range(8), **options) for joint in both(tiny))
    assert 0 < np.abs(full.images.astype(float) - half.images).mean() < 1
    np.testing.assert_allclose(half.probabilities, full.probabilities, atol=0.01)
    assert half.settings["dtype"] == "bfloat16"


def test_probabilities_are_near_those_of_float32(tiny):
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1)).astype(np.uint8)
    full, half = (jdm.classify(joint, images) for joint in both(tiny))
    assert full.dtype == half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.01)
    assert (half != full).any()
