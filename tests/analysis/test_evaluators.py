import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import jdm
from jdm import distributed, names
from jdm.analysis import calibration
from jdm.analysis.evaluators import EVALUATORS, evaluate
from jdm.analysis.evaluators.base import EvaluationOptions, Value
from jdm.analysis.logits import image_logits
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


def found_by(name, joint, images, labels, batch_size=BATCH, **options) -> dict[str, Value]:
    split = Split(images, labels, "test")
    return dict(evaluate(joint, [name], split, EvaluationOptions(batch_size, **options)))


def classification(joint, images, labels, batch_size=BATCH) -> dict[str, float]:
    """The floats alone."""
    found = found_by("classification", joint, images, labels, batch_size)
    return {name: value for name, value in found.items() if isinstance(value, float)}


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
    errors = probabilities - np.eye(10)[split.labels]
    assert found["brier"] == pytest.approx((errors**2).sum(axis=1).mean(), rel=1e-5)


def test_the_tables_of_classes_count_what_is_predicted(joint, split):
    names = tuple("abcdefghij")
    named = dataclasses.replace(joint, dataset={"class_names": names})
    labels = split.labels.copy()
    labels[::7] = -1
    labels[labels == 3] = 4  # a class without images
    found = found_by("classification", named, split.images, labels)
    known = labels >= 0
    predicted = jdm.classify(joint, split.images, batch_size=BATCH).argmax(axis=1)
    given = labels[known], predicted[known]
    rows, columns, counts = found["confusion"]
    assert rows == columns == names
    np.testing.assert_array_equal(counts, confusion_matrix(*given, labels=range(10)))

    rows, columns, values = found["classes"]
    assert (rows, columns) == (names, ("precision", "recall", "F1", "images"))
    expected = precision_recall_fscore_support(*given, labels=range(10), zero_division=0)
    np.testing.assert_allclose(values, np.stack(expected, axis=1))
    assert all(type(x) is float for row in values for x in row)
    unnamed = found_by("classification", joint, split.images, labels)
    assert unnamed["classes"].rows == tuple("0123456789")


def test_partial_batches_and_unlabelled_images_count_right(joint, split):
    images, labels = split
    whole = classification(joint, images, labels, batch_size=100)
    assert classification(joint, images, labels) == pytest.approx(whole, rel=1e-5)
    hidden = labels.copy()
    hidden[50:] = -1
    some = classification(joint, images[:50], labels[:50])
    assert classification(joint, images, hidden) == pytest.approx(some, rel=1e-5)


def test_a_share_of_the_images_has_the_noise_of_the_whole(joint, split, monkeypatch):
    """As process 1 of 2: images 5 to 9 of 10."""
    images, sent = split.images[:10], []
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "index", lambda: 1)
    monkeypatch.setattr(distributed, "gathered", lambda x: sent.append(x) or [x, x])
    image_logits(joint, images, 8, t=20, shared=True)
    np.testing.assert_array_equal(sent[0], image_logits(joint, images, 8, t=20)[5:])


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

    everything = found_by("classification", multi_label, images, labels)
    names, columns, values = everything["attributes"]
    assert names == tuple("0123456789") and len(columns) == 4
    for k, (accuracy, precision, count, positive) in enumerate(values):
        seen, truth = known[:, k], labels[known[:, k], k] == 1
        assert (count, positive) == (seen.sum(), truth.sum())
        assert accuracy == np.mean((sigmoid[seen, k] > 0.5) == truth)
        # The precision among the images that score as high, at the rank of each positive.
        order = np.argsort(-sigmoid[seen, k])
        hits = truth[order]
        at_rank = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        assert precision == pytest.approx(at_rank[hits].mean(), rel=1e-5)
    mean = np.mean([row[1] for row in values])
    assert everything["mean_average_precision"] == pytest.approx(mean)

    labels[:, 2:] = np.minimum(labels[:, 2:], 0)  # the other attributes do not occur
    fewer = found_by("classification", multi_label, images, labels)
    assert fewer["mean_average_precision"] == pytest.approx((values[0][1] + values[1][1]) / 2)


def test_accuracy_by_noise_level(joint, split):
    images, labels = split.images[:64], split.labels[:64]
    (x_label, _, t, lines), T = found_by("noise", joint, images, labels)["accuracy_by_t"], 50
    assert (x_label, t[0], t[-1], len(t)) == ("t", 0, T - 1, 8)
    # An image's noise at every level is the same, by the seed and its index.
    key = jax.random.key(0)
    draws = [
        jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), T), (8, 8, 1))
        for i in range(64)
    ]
    x = jnp.asarray(images / 127.5 - 1, jnp.float32)
    for level, accuracy in zip(t, lines["accuracy"], strict=True):
        abar = joint.diffusion.abar[level]
        xt = np.sqrt(abar) * x + np.sqrt(1 - abar) * jnp.stack(draws) if level else x
        assert accuracy == np.mean(joint.logits(xt, level).argmax(axis=1) == labels)
    clean = classification(joint, images, labels)["accuracy"]
    assert lines["accuracy"][0] == clean


def test_calibration_is_fitted_on_validation_and_measured_on_the_split(joint, split):
    images, labels = split
    asked, validation = [], load_split("digits", "validation")

    def load(name):
        asked.append(name)
        return Split(validation.images[:100], validation.labels[:100], name)

    found = found_by("calibration", joint, images, labels, load=load)
    assert asked == ["validation"]
    logits = image_logits(joint, images, BATCH).astype(np.float64)
    fitted_on = image_logits(joint, validation.images[:100], BATCH).astype(np.float64)
    temperature = calibration.fit_temperature(fitted_on, validation.labels[:100])
    assert found["temperature"] == pytest.approx(temperature)
    _, columns, (before, after) = found["temperature_scaling"]
    assert len(columns) == 3
    for suffix, divisor, row in (("", 1, before), ("/scaled", temperature, after)):
        bins = calibration.reliability(logits / divisor, labels)
        assert found[f"calibration_error{suffix}"] == bins.expected_calibration_error == row[0]
        assert row[1] == calibration.cross_entropy(logits / divisor, labels)
        assert row[2] == calibration.brier_score(logits / divisor, labels)
        curve = found[f"reliability{suffix}"]
        error = np.abs(np.subtract(curve.lines["accuracy"], curve.x)) @ curve.lines["share"]
        assert error == pytest.approx(row[0])


def test_calibration_without_a_validation_split_is_one_sentence(joint, split):
    needs = "^metrics='calibration' needs the split 'validation' of the data set, to fit a temp"
    with pytest.raises(InvalidValue, match=needs):
        found_by("calibration", joint, *split)

    def load(name):
        raise InvalidValue("split", name, "is unknown; mnist has train, test")

    with pytest.raises(InvalidValue, match=needs + ".*; config.data.validation holds a share"):
        found_by("calibration", joint, *split, load=load)
    with pytest.raises(InvalidValue, match="^split='validation' has no labelled image$"):
        hidden = Split(split.images, np.full(100, -1, np.int32), "validation")
        found_by("calibration", joint, *split, load=lambda name: hidden)


def test_every_metric_with_a_better_end_is_of_an_evaluator():
    assert {metric.evaluator for metric in names.METRICS.values()} <= set(EVALUATORS)
