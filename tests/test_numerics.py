"""The same seed gives the same image, and a run the same losses, under every flag of JAX."""

import jax
import numpy as np
import pytest

import jdm
from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.config import load_config
from jdm.data.splits import load_split
from jdm.numerics import key_of
from jdm.sampling import programs
from jdm.tracking import read_metrics
from jdm.trainer import train

# Each changes numbers, or could: what is drawn, with which precision, and what is refused.
FLAGS = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 7,
    "jax_default_matmul_precision": "bfloat16",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_legacy_prng_key": "error",
    "jax_enable_custom_prng": True,
    "jax_debug_key_reuse": True,
}


@pytest.fixture
def flags():
    """flags(names): sets these flags until the end of the test; programs are compiled anew."""
    before = {name: getattr(jax.config, name) for name in FLAGS}

    def change(names):
        for name in names:
            jax.config.update(name, FLAGS[name])
        programs.compile_sampler.cache_clear()

    yield change
    for name, value in before.items():
        jax.config.update(name, value)


def results(path):
    """What every public function returns for a few seeds and images."""
    joint, rng = jdm.load(path), np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    noisy, t = rng.normal(size=(4, 8, 8, 1)).astype(np.float32), np.arange(4, dtype=np.int32)
    split, options = load_split("digits", "validation"), EvaluationOptions(64, bound_steps=2)
    evaluated = evaluate(joint, ["classification", "likelihood"], split, options)
    few = dict(sampler="ancestral", labels=[1, 2, 3, 4], guidance="pixel", steps=2)
    return {
        "sample": jdm.sample(joint, seeds=[3, 5, 7, 2**32 - 1], **few).images,
        "interpolate": jdm.interpolate(joint, (3, 5), 4, steps=2).images,
        "evaluate": np.array([x for _, x in evaluated if isinstance(x, float)]),
        "classify": jdm.classify(joint, images),
        "logits": np.asarray(joint.logits(noisy, t)),
        "denoise": np.asarray(joint.denoise(noisy, t)),
    }


def test_the_same_seed_is_the_same_image(tiny, flags):
    expected = results(tiny)
    flags(FLAGS)
    found = results(tiny)
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype, name
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def test_the_losses_of_a_run_are_the_same(tiny, flags, tmp_path):
    flags(FLAGS)
    train(load_config("tiny", ["--config.train.steps=2"]), tmp_path)
    losses = [[row["train/loss"] for row in read_metrics(path)] for path in (tiny, tmp_path)]
    assert losses[0][:2] == losses[1]


def test_keys_are_those_of_jax_without_flags():
    seeds = np.array([0, 1, 2**32 - 1], np.uint32)
    expected = jax.random.key_data(jax.vmap(jax.random.key)(seeds))
    np.testing.assert_array_equal(jax.random.key_data(key_of(seeds)), expected)
    np.testing.assert_array_equal(jax.random.key_data(key_of(5)), [0, 5])
