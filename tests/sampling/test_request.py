"""What jdm.sample refuses, in one sentence, before any work."""

import dataclasses

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jdm
from jdm.diffusion.method import Method
from jdm.errors import InvalidValue
from jdm.joint import check_noise
from jdm.sampling.request import check_request, from_noise


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(guidance="pixels", labels=[1]), "guidance='pixels' is unknown; known: none, pixel"),
        (dict(sampler="euler"), "sampler='euler' is unknown; known: ancestral, ddim, dpmpp_2m, h"),
        (dict(spacing="karras"), "spacing='karras' is unknown; known: uniform, quadratic, log_snr"),
        (dict(threshold="clip"), "threshold='clip' is unknown; known: none, static, dynamic"),
        (
            dict(labels=[1], guidance="pixel", scale_schedule="linear"),
            "scale_schedule='linear' is unknown; known: constant, early, late, middle",
        ),
        (dict(labels=[10], guidance="pixel"), "labels hold 10; .* 0 to 9"),
        (dict(labels=[-2], guidance="pixel"), "labels hold -2"),
        (dict(labels=[1.5], guidance="pixel"), "labels must be a list of whole numbers"),
        (dict(labels=[1, 2], seeds=[1, 2, 3], guidance="pixel"), "labels are 2 for 3 images"),
        (
            dict(labels=[[0.5, 0.5]], guidance="pixel"),
            r"labels of two dim.* floats of the shape \(N, 10\), not",
        ),
        (dict(labels=[[0.5] * 10], guidance="pixel"), "labels hold the probabilities .* sum to 1"),
        (
            dict(labels=[[1.5, -0.5] + [0.0] * 8], guidance="pixel"),
            "labels hold the prob.* not be negative",
        ),
        (dict(labels=[[1.0], [0.5, 0.5]], guidance="pixel"), "labels must be rows of the same len"),
        (
            dict(labels=np.eye(10, dtype=int)[:1], guidance="pixel"),
            "labels of two .* floats of the shape",
        ),
        (dict(n=2, seeds=[1, 2, 3]), "seeds are 3 for n=2"),
        (dict(seeds=[-1]), "seeds hold -1"),
        (dict(n=0), "n=0"),
        (dict(guidance="pixel"), "guidance='pixel' needs labels"),
        (dict(steps=51), "steps=51 must lie between 1 and diffusion.steps=50"),
        (dict(steps=0), "steps=0"),
        (dict(steps="2,26"), "steps='2,26' asks for 26 of the 25"),
        (dict(steps="2,2", spacing="log_snr"), "steps='2,2' has section counts, which"),
        (dict(labels=[1], guidance="pixel", scale=float("nan")), "scale=nan must be finite"),
        (
            dict(labels=[1], guidance="pixel", scale=1e39),
            r"scale=1e\+39 must be finite as float32",
        ),
        (dict(scale=3.0), "scale=3.0 goes with guidance pixel or rep.*, not 'none'"),
        (
            dict(scale_schedule="late"),
            "scale_schedule='late' goes with guidance pixel or .*, not 'none'",
        ),
        (dict(labels=[1], guidance="representation", blocks="mid"), "blocks='mid' must be a list"),
        (dict(eta=2.0), "eta=2.0"),
        (dict(eta=0.5, sampler="heun"), "eta=0.5 goes with sampler ddim, not 'heun'"),
        (dict(batch_size=0), "batch_size=0"),
        (
            dict(labels=[1], guidance="representation", blocks=["mid", "skip_3"]),
            "blocks='skip_3' is unknown; known: mid, stem, encoder_0_0, down_0, encoder_1_0",
        ),
        (dict(labels=[1], guidance="representation", blocks=[]), "blocks is empty; known: mid"),
        (
            dict(labels=[1], guidance="pixel", blocks=["mid"]),
            "blocks=.'mid',. goes with guidance rep",
        ),
        (dict(noise=np.zeros((2, 8, 8, 3))), r"noise has the shape \(2, 8, 8, 3\)"),
        (dict(noise=np.full((2, 8, 8, 1), np.nan)), "noise has values that are not finite"),
        (
            dict(noise=np.full((2, 8, 8, 1), 1e300)),
            "noise has values that are not finite as float32",
        ),
        (
            dict(noise=np.zeros((2, 8, 8, 1), np.uint8)),
            "noise has the dtype uint8; floats are needed",
        ),
        (dict(n=3, noise=np.zeros((2, 8, 8, 1))), "noise is given for 2 images of 3"),
    ],
)
def test_bad_requests_are_one_sentence(joint, options, said):
    with pytest.raises(ValueError, match=f"^{said}") as info:
        jdm.sample(joint, **options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(labels=3, guidance="pixel"), r"labels=3 must be a list, such as \[3\]"),
        (dict(seeds=7), r"seeds=7 must be a list, such as \[7\]"),
        (dict(n="3"), "n='3' must be a whole number"),
        (dict(batch_size=2.5), "batch_size=2.5 must be a whole number"),
        (dict(eta="half"), "eta='half' must be a number"),
        (dict(labels=[1], guidance="pixel", scale="8"), "scale='8' must be a number"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(joint, options, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(ValueError, match=f"^{said}"):
        jdm.sample(joint, **options)


def test_a_model_that_was_trained_to_classify_alone_generates_no_images(joint):
    config = joint.config.copy_and_resolve_references()
    config.loss.terms = ("classifier",)
    with pytest.raises(ValueError, match="^joint is a model that was trained to classify alone$"):
        jdm.sample(dataclasses.replace(joint, config=config))


@pytest.mark.parametrize("key, value", [("terms", ("diffusion",)), ("weight", 0.0)])
def test_guidance_needs_a_classifier_that_was_trained(joint, key, value):
    config = joint.config.copy_and_resolve_references()
    config.loss[key] = value
    without = dataclasses.replace(joint, config=config)
    with pytest.raises(
        ValueError, match="^guidance='pixel' needs a classifier; this model was tra"
    ):
        jdm.sample(without, labels=[1], guidance="pixel")
    with pytest.raises(
        ValueError, match="^classifier is a model that was trained without a classifier"
    ):
        jdm.sample(joint, labels=[1], guidance="pixel", classifier=without)


@pytest.mark.parametrize("labels", [[1], [[1] * 9], [[2] + [0] * 9], [[0.5] * 10]])
def test_labels_of_a_multi_label_model_are_on_off_or_not_guided(joint, labels):
    multi = dataclasses.replace(joint, model=joint.model.clone(multi_label=True))
    with pytest.raises(ValueError, match=r"^labels of a multi-label model.*\(N, 10\)"):
        jdm.sample(multi, labels=labels, guidance="pixel")


def test_labels_without_guidance_are_warned_about(joint):
    with pytest.warns(UserWarning, match="guidance='none' does not use them"):
        check_request(joint, labels=[1], method=Method(guidance="none"))


def test_what_a_method_leaves_open_follows_from_the_labels_and_the_guidance(joint):
    def found(labels=None, classifier=None, **options):
        given = dict(labels=labels, classifier=classifier, method=Method(**options))
        method = check_request(joint, **given).recipe.method
        return method.guidance, method.sampler, method.steps, method.threshold

    assert found() == ("none", "ddim", 50, "static")
    assert found([1]) == ("representation", "ancestral", 20, "static")
    assert found([1], guidance="published") == ("published", "ancestral", 20, "none")
    assert found([1], sampler="heun", steps=7)[:3] == ("representation", "heun", 7)
    assert found([1], threshold="none")[3] == "none"
    assert found([1], classifier=joint)[0] == "pixel"  # which another classifier can guide
    assert (
        from_noise(Method()).sampler == "ddim"
        and from_noise(Method(sampler="heun")).sampler == "heun"
    )
    with pytest.raises(InvalidValue, match="^scale=2.0 goes with guidance .*, not 'none'$"):
        found(scale=2.0)


def test_labels_alone_guide(joint, assert_same_images):
    named = dict(guidance="representation", scale=0.7, sampler="ancestral", steps=20)
    ours, theirs = (jdm.sample(joint, 2, labels=[1], **options) for options in ({}, named))
    assert_same_images(ours.images, theirs.images)
    assert ours.settings == theirs.settings | {"model": ours.settings["model"]}
    assert (ours.images != jdm.sample(joint, 2, sampler="ancestral", steps=20).images).any()


def test_n_labels_and_seeds_are_brought_to_one_length(joint):
    def rows(*n, **options):
        method = Method(guidance="pixel")
        request = check_request(joint, *n, method=method, **{"labels": [4], **options})
        return request.labels.tolist(), request.seeds.tolist()

    assert rows() == ([4], [0])
    assert rows(3) == ([4, 4, 4], [0, 1, 2])
    assert rows(seeds=[7, 9]) == ([4, 4], [7, 9])
    assert rows(labels=[1, None, -1]) == ([1, -1, -1], [0, 1, 2])
    plain = check_request(joint, method=Method())
    assert plain.seeds.tolist() == [0] and plain.labels is None


def test_floats_of_any_precision_are_floats(joint):
    """NumPy does not count bfloat16 as one."""
    method, half = Method(guidance="pixel"), jnp.bfloat16
    labels = np.full((2, 10), 0.1).astype(half)
    request = check_request(joint, method=method, labels=labels)
    assert request.labels.dtype == np.float32 and request.labels.sum() == pytest.approx(2, abs=0.01)
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(half)
    checked = check_noise(joint, "noise", noise)
    np.testing.assert_array_equal(checked, noise.astype(np.float32))
