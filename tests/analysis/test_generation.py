"""Reference classifiers, the features of distances, and the evaluator that uses both."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import jdm
from jdm.analysis import extractors, metrics, reference
from jdm.analysis.evaluators import EvaluationOptions, evaluate
from jdm.analysis.evaluators.base import Record, Table
from jdm.analysis.evaluators.generation import generation
from jdm.data.splits import Split, load_split
from jdm.diffusion.method import Method
from jdm.errors import Failure, InvalidValue


@pytest.fixture(scope="module")
def splits():
    return {name: load_split("digits", name) for name in ("train", "test")}


@pytest.fixture(scope="module")
def joint(tiny):
    return jdm.load(tiny)


def test_reference_classifiers_tell_right_labels_of_real_digits_from_wrong_ones(splits):
    fitted, (images, labels) = reference.ReferenceClassifiers(*splits["train"]), splits["test"]
    right = fitted.agreement(images, labels)
    wrong = fitted.agreement(images, (labels + 1) % 10)
    assert set(right) == {"svc", "1-nn"}
    assert min(right.values()) > 0.96 and max(wrong.values()) < 0.02


def test_a_fit_serves_all_calls_and_is_deterministic(splits, monkeypatch):
    from sklearn.svm import SVC

    fits, fit = [], SVC.fit
    monkeypatch.setattr(SVC, "fit", lambda *args: fits.append(1) or fit(*args))
    (train, train_labels), (images, labels) = splits["train"], splits["test"]
    one, other = (reference.ReferenceClassifiers(train[:100], train_labels[:100]) for _ in range(2))
    right, wrong = (one.agreement(images, some) for some in (labels, (labels + 1) % 10))
    assert right == other.agreement(images, labels)
    assert right["svc"] > 0.9 and wrong["svc"] < 0.1
    np.testing.assert_array_equal(one.features(images), other.features(images))
    assert len(fits) == 2


def test_features_tell_classes_apart_and_real_images_from_noise(splits):
    train, train_labels = (array[:600] for array in splits["train"])  # half the time of a whole fit
    fitted, (images, labels) = reference.ReferenceClassifiers(train, train_labels), splits["test"]
    features, known = fitted.features(images), fitted.features(train)
    assert features.shape == (360, reference.FEATURES) and features.min() == 0
    means = np.stack([known[train_labels == k].mean(axis=0) for k in range(10)])
    nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.9

    # Other real digits are nearer than digits without one of the classes, or noise.
    real = metrics.frechet_distance(known, features)
    without_3 = metrics.frechet_distance(known, fitted.features(images[labels != 3]))
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert 0 < 3 * real < without_3 < metrics.frechet_distance(known, fitted.features(noise))


# The network --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(joint, splits, tmp_path_factory):
    """(a network of the digits, trained for a few steps; the folder that it is kept in)."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MOST_STEPS", 120)
        return reference.network(joint, splits["train"], cache), cache


def test_the_network_learns_and_is_kept_as_a_model_that_load_reads(
    joint, splits, network, monkeypatch
):
    found, cache = network
    images, labels = splits["test"]
    assert np.mean(jdm.classify(found, images).argmax(axis=1) == labels) > 0.4  # chance is 0.1
    (folder,) = cache.iterdir()
    again = jdm.load(folder)
    assert again.digest == found.digest and again.class_names == joint.class_names
    assert again.config.loss.terms == ("classifier",) and again.config.loss.augment == "none"

    monkeypatch.setattr(reference, "_trained", lambda *_: pytest.fail("it was trained again"))
    monkeypatch.setattr(reference, "MOST_STEPS", 120)
    assert reference.network(joint, splits["train"], cache).digest == found.digest


def test_other_labels_need_another_network(joint, splits, network, monkeypatch):
    images, labels = splits["train"]
    monkeypatch.setattr(reference, "MOST_STEPS", 120)
    monkeypatch.setattr(reference, "_trained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference.network(joint, Split(images, (labels + 1) % 10, "train"), network[1])


def test_features_of_the_network_are_what_its_last_layer_reads(splits, network):
    found, images = network[0], splits["test"].images[:20]
    made = reference.ReferenceNetwork(found, batch_size=8)
    features = made.features(images)
    assert features.shape == (20, made.dimension) and made.digest == found.digest
    last = found.params["head"]["out"]
    logits = features @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(logits, found.logits(images / 127.5 - 1), atol=1e-4)
    np.testing.assert_array_equal(made.predictors["network"](images), logits.argmax(axis=1))


def test_the_config_of_the_network_suits_the_images(joint):
    def config(flips=False, count=60_000, **fields):
        return reference.network_config(joint.model.clone(**fields), count, flips)

    assert config(image_size=28).model.multipliers == (1, 2, 4)  # 28, 14, 7
    assert config(image_size=64).model.multipliers == (1, 2, 4, 4)
    assert config(image_size=27).model.multipliers == (1,)
    assert config(flips=True).loss.augment == "natural" and config().loss.augment == "none"
    assert config(count=4_000).loss.augment == "digits"  # each image is seen many times
    assert config(count=100).train.steps < config().train.steps


def test_unlabelled_images_are_left_out_and_a_split_without_labels_is_refused(joint, splits):
    images, labels = (x[:60] for x in splits["train"])
    hidden = np.where(np.arange(60) < 40, labels, -1)
    made = reference.make_reference(joint, Split(images, hidden, "train"), Path(), 8)
    some = reference.ReferenceClassifiers(images[:40], labels[:40]).predictors
    test = splits["test"].images
    for name, predict in made.predictors.items():
        np.testing.assert_array_equal(predict(test), some[name](test))
    nothing = Split(images, np.full(60, -1, np.int32), "train")
    with pytest.raises(InvalidValue, match="^split='train' has no labelled image"):
        reference.make_reference(joint, nothing, Path(), 8)


def no_reference():
    pytest.fail("no reference classifier is needed")


# Extractors ---------------------------------------------------------------------------------------


def test_features_of_real_images_are_kept_by_identity_and_contents(splits, tmp_path):
    images, calls = splits["test"].images[:5], []

    def extract(x):
        calls.append(len(x))
        return x.reshape(len(x), -1)[:, :3].astype(np.float32)

    one = extractors.Extractor("reference", "0" * 16, 3, extract)
    first = extractors.real_features(one, images, tmp_path)
    np.testing.assert_array_equal(extractors.real_features(one, images, tmp_path), first)
    assert calls == [5]
    extractors.real_features(one, images[::-1], tmp_path)  # other images
    extractors.real_features(one._replace(digest="1" * 16), images, tmp_path)  # other weights
    extractors.real_features(one._replace(kept=False), images, tmp_path)
    assert calls == [5] * 4 and len(list(tmp_path.iterdir())) == 3

    for path in tmp_path.glob("*/features.npy"):
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Failure, match="features.npy is damaged .*: delete "):
        extractors.real_features(one, images, tmp_path)


def test_features_of_the_model_are_its_own(joint, splits):
    images = splits["test"].images[:6]
    found = extractors.EXTRACTORS["joint"](joint, no_reference, 4)()
    values = jdm.features(joint, images, t=0, blocks="mid", batch_size=4).values
    np.testing.assert_array_equal(found.extract(images), values)
    assert found.identity == {"name": "joint", "digest": joint.digest, "dimension": 16}


def test_inception_says_what_is_missing(joint, monkeypatch, tmp_path):
    make = extractors.EXTRACTORS["inception"]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    said = r"^features='inception' needs torch-fidelity; pip install 'jdm\[fid\]' .*'reference'"
    with pytest.raises(InvalidValue, match=said):
        make(joint, no_reference, 4)


def test_inceptions_weights_are_found_by_path(joint, monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity", reason="of the extra fid")
    monkeypatch.setenv("JDM_INCEPTION", str(tmp_path / "none.pth"))
    with pytest.raises(InvalidValue, match="^JDM_INCEPTION='.*none.pth' is not a file; its"):
        extractors.EXTRACTORS["inception"](joint, no_reference, 4)
    (tmp_path / "none.pth").write_bytes(b"nothing")
    with pytest.raises(InvalidValue, match="^JDM_INCEPTION='.*none.pth' holds no weights that"):
        extractors.EXTRACTORS["inception"](joint, no_reference, 4)


# The evaluator ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(joint, splits, tmp_path_factory):
    """(options, what the evaluator yields) of 40 samples in 2 steps."""
    options = EvaluationOptions(
        batch_size=64,
        load=splits.__getitem__,
        samples=40,
        method=Method(steps=2),
        features="joint",
        cache=tmp_path_factory.mktemp("cache"),
        seed=7,
    )
    return options, dict(evaluate(joint, ["generation"], splits["test"], options))


def test_generation_yields_what_the_parts_compute(joint, splits, generated):
    options, found = generated
    samples = jdm.sample(joint, labels=np.arange(40) % 10, seeds=range(7, 47), steps=2)
    fitted = reference.ReferenceClassifiers(*splits["train"])
    for name, rate in fitted.agreement(samples.images, samples.labels).items():
        assert found[f"agreement/{name}"] == pytest.approx(rate)
    for name, rate in fitted.agreement(*splits["test"]).items():
        assert found[f"agreement/{name}_real"] == rate > 0.96
    real, fake = (
        jdm.features(joint, x, t=0, blocks="mid", batch_size=64).values
        for x in (splits["test"].images, samples.images)
    )
    assert found["frechet_40/joint"] == pytest.approx(metrics.frechet_distance(real, fake))
    assert found["kid_40/joint"] == pytest.approx(metrics.kernel_distance(real, fake))
    precision = metrics.precision_recall(real, fake)
    assert (found["precision_40/joint"], found["recall_40/joint"]) == precision
    # Both are divided by the same mean, that of 40 real images.
    nearest = metrics.nearest_distances(splits["train"].images, samples.images)
    mean, least = (found[f"nearest_neighbour_ratio/{name}"] for name in ("mean", "least"))
    assert least / mean == pytest.approx(nearest.min() / nearest.mean())
    assert {"prd_f8_40/joint", "prd_f1_8_40/joint", "diversity/mean"} < set(found)


def test_generation_compares_real_images_with_real_images(generated):
    """Forty real images are nearer to the split than samples of two steps are."""
    _, found = generated
    assert found["frechet_real_40/joint"] < found["frechet_40/joint"]
    assert found["precision_real_40/joint"] > 0.8


def test_generation_says_what_its_figures_depend_on(joint, generated):
    _, found = generated
    record, table = found["generation"], found["agreement_by_class"]
    assert isinstance(record, Record) and isinstance(table, Table)
    values = json.loads(json.dumps(record.values))
    assert values["features"]["digest"] == joint.digest and values["seeds"] == [7, 46]
    assert values["method"]["steps"] == 2 and values["split"] == "test"
    assert table.rows == joint.class_names and table.columns[:2] == ["svc", "svc_real"]
    mean = np.mean([row[0] for row in table.values])  # every class was asked for equally often
    assert mean == pytest.approx(found["agreement/svc"])
    assert all(type(x) is float for x in found.values() if not isinstance(x, Record | Table))


def test_a_model_without_a_classifier_gets_the_distances(joint, splits, generated):
    config = joint.config.copy_and_resolve_references().unlock()
    config.loss.terms = ("diffusion",)
    alone = dataclasses.replace(joint, config=config)
    found = dict(evaluate(alone, ["generation"], splits["test"], generated[0]))
    assert "frechet_40/joint" in found and "nearest_neighbour_ratio/least" in found
    assert not any(name.startswith(("agreement", "diversity")) for name in found)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(samples=19), "^samples=19 are too few: 20 or more are needed"),
        (dict(features="joints"), "^features='joints' is unknown; known: reference, joint"),
        (dict(load=None), "^split='test' is given without the training split"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sampled(
    joint, splits, generated, monkeypatch, change, said
):
    monkeypatch.setattr("jdm.analysis.evaluators.generation.generate", lambda *_: pytest.fail())
    with pytest.raises(InvalidValue, match=said):
        next(generation(joint, splits["test"], dataclasses.replace(generated[0], **change)))


def test_a_model_that_only_classifies_is_refused(network, splits, generated):
    with pytest.raises(InvalidValue, match="^joint is a model that was trained to classify alone"):
        next(generation(network[0], splits["test"], generated[0]))
