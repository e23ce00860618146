"""sample(): seeds, batches, devices, files and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import jdm
from jdm import sampling


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


def assert_same_images(a, b):
    """The same, as far as floats summed in another order are: one level on 0.1 % of pixels."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", "pixel"), ("ancestral", "none")])
@pytest.mark.filterwarnings("ignore:labels are given")
def test_same_seed_same_image_at_any_batch_size(joint, sampler, guidance):
    options = dict(seeds=range(8), labels=np.arange(8), steps=4, sampler=sampler, guidance=guidance)
    whole = jdm.sample(joint, **options, batch_size=8)
    for batch_size in (1, 3):
        assert_same_images(whole.images, jdm.sample(joint, **options, batch_size=batch_size).images)
    again = jdm.sample(joint, **options, batch_size=8)
    np.testing.assert_array_equal(whole.images, again.images)


def test_image_depends_on_its_seed_alone(joint):
    one = jdm.sample(joint, seeds=[5, 6, 7, 8], steps=4)
    other = jdm.sample(joint, seeds=[100, 6, 8, 2], steps=4)
    np.testing.assert_array_equal(one.images[[1, 3]], other.images[[1, 2]])  # the same padded shape
    assert (one.images[0] != one.images[1]).any()


def test_eight_devices_give_the_images_of_one(tiny, joint):
    code = f"""
import jax, numpy as np, jdm
assert jax.device_count() == 8
samples = jdm.sample({str(tiny)!r}, seeds=range(20), labels=[3], guidance="representation", steps=3)
np.save(__import__("sys").argv[1], samples.images)
"""
    path = tiny / "eight.npy"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=True)
    one = jdm.sample(joint, seeds=range(20), labels=[3], guidance="representation", steps=3)
    assert_same_images(np.load(path), one.images)


def test_pixel_guidance_follows_the_classifier_it_is_given(joint):
    options = dict(seeds=range(8), labels=[3], guidance="pixel", scale=50.0, steps=4)
    own = jdm.sample(joint, **options)
    again = jdm.sample(joint, classifier=joint, **options)
    assert_same_images(own.images, again.images)
    assert own.settings["classifier"] is None and again.settings["classifier"] == "a Joint"
    # Every logit turned round: another classifier on the same network.
    head = jax.tree.map(lambda x: -x, joint.params["head"]["out"])
    params = joint.params | {"head": joint.params["head"] | {"out": head}}
    other = dataclasses.replace(joint, weights=joint.weights | {"params": params})
    found = jdm.sample(joint, classifier=other, **options)
    assert (found.images != own.images).any()


def test_a_classifier_that_cannot_judge_is_refused(joint):
    longer = dataclasses.replace(joint, diffusion=dataclasses.replace(joint.diffusion, steps=100))
    with pytest.raises(ValueError, match=r"^classifier knows the schedule \('linear', 100\); this"):
        jdm.sample(joint, labels=[1], guidance="pixel", classifier=longer)
    with pytest.raises(ValueError, match="^classifier goes with guidance='pixel', not with 'none'"):
        jdm.sample(joint, classifier=joint)


def test_guidance_toward_one_class_is_not_for_several_labels(joint):
    several = dataclasses.replace(joint, model=joint.model.clone(multi_label=True))
    with pytest.raises(ValueError, match="^guidance='pixel' .* multi-label"):
        jdm.sample(several, labels=[1], guidance="pixel")


def test_second_call_compiles_nothing(joint):
    options = dict(labels=[1], guidance="pixel", steps=4)
    jdm.sample(joint, 8, **options)
    before = sampling._generate._cache_size()
    jdm.sample(joint, 8, **options, scale=3.0, seeds=range(50, 58))
    assert sampling._generate._cache_size() == before


def test_scale_zero_is_no_guidance(joint):
    plain = jdm.sample(joint, 4, steps=4)
    for guidance in ("pixel", "representation"):
        zero = jdm.sample(joint, 4, labels=[1], guidance=guidance, scale=0.0, steps=4)
        assert_same_images(plain.images, zero.images)


def test_n_labels_and_seeds_are_brought_to_one_length(joint):
    assert len(jdm.sample(joint, steps=1).images) == 1
    assert list(jdm.sample(joint, 3, steps=1).seeds) == [0, 1, 2]
    samples = jdm.sample(joint, labels=[4], seeds=[7, 9], guidance="pixel", steps=1)
    assert list(samples.labels) == [4, 4] and list(samples.seeds) == [7, 9]
    assert jdm.sample(joint, labels=[1, 2, 3], guidance="pixel", steps=1).images.shape[0] == 3


def test_labels_without_guidance_are_warned_about(joint):
    with pytest.warns(UserWarning, match="guidance='none' does not use them"):
        jdm.sample(joint, labels=[1], steps=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(guidance="pixels", labels=[1]), "guidance='pixels' is unknown; known: none, pixel"),
        (dict(sampler="euler"), "sampler='euler' is unknown; known: ancestral, ddim"),
        (dict(labels=[10], guidance="pixel"), "labels hold 10; .* 0 to 9"),
        (dict(labels=[-1], guidance="pixel"), "labels hold -1"),
        (dict(labels=[1.5], guidance="pixel"), "labels must be a list of whole numbers"),
        (dict(labels=[1, 2], seeds=[1, 2, 3], guidance="pixel"), "labels are 2 for 3 images"),
        (dict(n=2, seeds=[1, 2, 3]), "seeds are 3 for n=2"),
        (dict(seeds=[-1]), "seeds hold -1"),
        (dict(n=0), "n=0"),
        (dict(guidance="pixel"), "needs labels"),
        (dict(steps=51), "steps=51 must lie between 1 and diffusion.steps=50"),
        (dict(steps=0), "steps=0"),
        (dict(steps="2,26"), "steps=2,26 asks for 26 of the 25 times of a section"),
        (dict(labels=[1], guidance="pixel", scale=float("nan")), "scale=nan must be finite"),
        (dict(eta=2.0), "eta=2.0"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_bad_requests_are_one_sentence(joint, options, said):
    with pytest.raises(ValueError, match=said) as info:
        jdm.sample(joint, **options)
    assert "\n" not in str(info.value)


def test_files(joint, tmp_path):
    samples = jdm.sample(joint, labels=[3, 4], guidance="pixel", steps="1,1")
    samples.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as saved:
        np.testing.assert_array_equal(saved["images"], samples.images)
        assert list(saved["labels"]) == [3, 4] and list(saved["seeds"]) == [0, 1]
        settings = json.loads(str(saved["settings"]))
    assert settings["guidance"] == "pixel" and settings["steps"] == "1,1"
    samples.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width >= 400
    assert samples._repr_png_() == (tmp_path / "x.png").read_bytes()
    with pytest.raises(ValueError, match=r"\.png, \.npz"):
        samples.save(tmp_path / "x.jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "x.png"]
