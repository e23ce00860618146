"""jdm.training.loss: what the encoder sees, and how the terms are added up."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.configs import base
from jdm.diffusion.process import Diffusion, pixels_to_float
from jdm.names import CLASSIFIED
from jdm.training.augment import POLICIES, augment

# Which of the encoder's 16 rows are classified: the noised images come first.
ROWS = {"clean": slice(8, 16), "noised": slice(0, 8), "both": slice(0, 16)}


# What the encoder sees.


def test_the_encoder_sees_the_noised_images_and_the_clean_ones_at_time_zero(toy):
    assert base.get_config().loss.augment == "none"
    seen = toy.evaluate(toy.joint_loss(classify="both", weight=0.0))
    np.testing.assert_array_equal(seen.x[8:], pixels_to_float(toy.BATCH["image"]))
    np.testing.assert_array_equal(seen.t[8:], np.zeros(8))
    noised = toy.evaluate(toy.joint_loss(classify="noised"))
    np.testing.assert_array_equal(noised.x, seen.x[:8])
    np.testing.assert_array_equal(noised.t, seen.t[:8])


def test_noise_and_times_are_drawn_from_separate_streams(toy):
    loss_fn = toy.joint_loss(classify="noised")
    base_seen = toy.evaluate(loss_fn)
    other_noise, other_t = (toy.evaluate(loss_fn, **{name: 7}) for name in ("noise", "t"))
    np.testing.assert_array_equal(other_noise.t, base_seen.t)
    assert np.abs(other_noise.x - base_seen.x).min() > 0
    assert (other_t.t != base_seen.t).any()


def test_times_cover_the_whole_chain_evenly_and_noise_is_standard_normal(toy):
    images = jnp.full((4000, 4, 4, 1), 153, jnp.uint8)
    batch = {"image": images, "label": jnp.full(4000, -1, jnp.int32)}
    diffusion = Diffusion(25)
    loss_fn = toy.joint_loss(diffusion, classify="noised")
    rows = jax.jit(lambda: toy.rows_of(loss_fn, batch))()
    x, t = (np.asarray(seen) for seen in rows.inputs["noised"][:2])
    counts = np.bincount(t, minlength=25)
    assert counts.shape == (25,) and t.dtype == np.int32
    assert np.abs(counts - 160).max() < 5 * np.sqrt(160)
    abar = diffusion.abar[t][:, None, None, None]
    eps = (x - np.sqrt(abar) * (153 / 127.5 - 1)) / np.sqrt(1 - abar)
    assert abs(eps.mean()) < 4 / np.sqrt(64000) and abs(eps.var() - 1) < 4 * np.sqrt(2 / 64000)


@pytest.mark.parametrize("classify", ["clean", "both"])
def test_only_the_clean_images_are_augmented(toy, classify):
    plain = toy.evaluate(toy.joint_loss(classify=classify))
    found = toy.evaluate(toy.joint_loss(classify=classify, augment="digits"))
    np.testing.assert_array_equal(found.x[:8], plain.x[:8])
    np.testing.assert_array_equal(found.t, plain.t)
    assert found.sums["diffusion"] == plain.sums["diffusion"]
    expected, pairs = augment(POLICIES["digits"], toy.keys()["augment"], plain.x[8:])
    assert pairs is None
    np.testing.assert_allclose(found.x[8:], expected, atol=1e-5)
    assert np.abs(found.x[8:] - plain.x[8:]).mean() > 0.01
    assert found.sums["cross_entropy"] != plain.sums["cross_entropy"]


def test_the_published_policy_augments_noised_images_if_those_are_classified(toy):
    plain = toy.evaluate(toy.joint_loss(classify="noised"))
    found = toy.evaluate(toy.joint_loss(classify="noised", augment="published"))
    np.testing.assert_array_equal(found.x[:8], plain.x)
    np.testing.assert_array_equal(found.t, np.tile(plain.t, 2))
    expected, _ = augment(POLICIES["published"], toy.keys()["augment"], plain.x)
    np.testing.assert_allclose(found.x[8:], expected, atol=1e-5)
    entropies = toy.entropies(found.x[8:], found.t[8:], toy.BATCH["label"])
    np.testing.assert_allclose(found.sums["cross_entropy"], sum(entropies), rtol=1e-4)
    assert found.sums["diffusion"] == plain.sums["diffusion"]


@pytest.mark.parametrize("classify", CLASSIFIED)
def test_the_statistics_of_the_head_are_those_of_all_its_inputs(toy, classify):
    class Counting(toy.Toy):
        """Keeps the sum of the pixels that its head was given, of the last call alone."""

        def classify(self, features, t, train=False):
            self.put_variable("batch_stats", "seen", before + features.mid.sum())
            return super().classify(features, t, train)

    before = jnp.float32(100)
    loss_fn = toy.joint_loss(model=Counting(**toy.FIELDS), classify=classify)
    found = toy.evaluate(loss_fn, batch_stats={"seen": before})
    expected = 100 + found.x[ROWS[classify]].sum()
    np.testing.assert_allclose(found.batch_stats["seen"], expected, rtol=1e-5)
    assert toy.CALLED.count("classify") == 1


# The sum of the terms.


@pytest.mark.parametrize("classify", CLASSIFIED)
def test_the_loss_is_the_error_and_lambda_times_the_mean_cross_entropy(toy, classify):
    found = toy.evaluate(toy.joint_loss(classify=classify, weight=0.3))
    labels = jnp.concatenate([toy.BATCH["label"]] * 2)[ROWS[classify]]
    expected = toy.entropies(found.x[ROWS[classify]], found.t[ROWS[classify]], labels)
    assert found.counts["cross_entropy"] == len(expected) == (12 if classify == "both" else 6)
    np.testing.assert_allclose(found.sums["cross_entropy"], sum(expected), rtol=1e-4)
    term = 0.3 * sum(expected) / len(expected)
    np.testing.assert_allclose(found.loss, found.sums["diffusion"] + term, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.001, 1.0, 10.0])
def test_lambda_scales_the_classifiers_term_alone(toy, weight):
    found = toy.evaluate(toy.joint_loss(weight=weight))
    mean = found.sums["cross_entropy"] / found.counts["cross_entropy"]
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], weight * mean, atol=1e-5)


@pytest.mark.parametrize("classify", ["noised", "both"])
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(toy, classify):
    """Also if only one part has labels, and with mixed images."""
    policy = "repaired" if classify == "both" else "published"
    loss_fn = toy.joint_loss(classify=classify, augment=policy, weight=3.0)
    labels = toy.BATCH["label"].at[:4].set(-1)
    rows = toy.rows_of(loss_fn, toy.BATCH | {"label": labels})
    assert list(jax.tree.map(jnp.copy, rows).inputs) == list(rows.inputs)  # jit keeps their order

    def loss(rows):
        value, (_, metrics, values) = loss_fn(toy.PARAMS, {}, rows, toy.keys()["dropout"])
        return (value, metrics), values

    whole, values = loss(rows)
    parts, parts_values = zip(
        *(loss(jax.tree.map(lambda x, p=p: x[p], rows)) for p in (slice(0, 4), slice(4, 8))),
        strict=True,
    )
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts_values)
    chex.assert_trees_all_close(joined, values, rtol=1e-5)
    assert list(values) == ["diffusion", "classifier"]


def test_a_batch_without_labels_trains_the_diffusion_alone(toy):
    batch = toy.BATCH | {"label": jnp.full((8,), -1, jnp.int32)}
    loss_fn = toy.joint_loss(weight=10.0)
    found = toy.evaluate(loss_fn, batch=batch)
    assert found.loss == found.sums["diffusion"]
    assert (found.sums["cross_entropy"], found.counts["cross_entropy"]) == (0, 0)
    grads = toy.gradient(loss_fn, batch=batch)
    np.testing.assert_array_equal(grads["slope"], np.zeros(3))
    np.testing.assert_array_equal(grads["clock"], np.zeros(3))
    assert np.abs(grads["raw"]).min() > 0
    assert np.abs(toy.gradient(loss_fn)["slope"]).min() > 0


@pytest.mark.parametrize("classify", CLASSIFIED)
def test_a_term_that_is_left_out_is_not_computed_and_the_other_is_as_it_was(toy, classify):
    joint = toy.evaluate(toy.joint_loss(classify=classify, weight=0.3))
    entropy = 0.3 * joint.sums["cross_entropy"] / joint.counts["cross_entropy"]
    noised = joint.x[:8]
    assert toy.CALLED == ["decode", "classify"]
    chex.assert_trees_all_equal(toy.DECODED, [noised, joint.t[:8]])
    assert len(joint.x) == (8 if classify == "noised" else 16)

    diffusion = toy.evaluate(toy.joint_loss(classify=classify, terms=("diffusion",)))
    assert toy.CALLED == ["decode"]
    assert set(diffusion.sums) == {"diffusion"}
    np.testing.assert_array_equal(diffusion.x, noised)
    np.testing.assert_allclose(diffusion.loss, joint.sums["diffusion"], rtol=1e-6)

    alone = toy.evaluate(toy.joint_loss(classify=classify, terms=("classifier",), weight=0.3))
    assert toy.CALLED == ["classify"]
    assert set(alone.sums) == {"cross_entropy", "accuracy"}
    np.testing.assert_allclose(alone.loss, entropy, rtol=1e-5)
    expected = {"clean": [toy.X0], "noised": [noised], "both": [noised, toy.X0]}[classify]
    np.testing.assert_allclose(alone.x, np.concatenate(expected), atol=1e-6)


def test_the_classifier_joins_at_its_step(toy):
    late, start = toy.joint_loss(classify_after=3), toy.joint_loss()
    for step in range(5):
        found, expected = toy.evaluate(late, step=step), toy.evaluate(start, step=step)
        assert found.loss == (expected.loss if step >= 3 else expected.sums["diffusion"])
        assert found.sums == expected.sums  # what is logged does not wait


# Settings that are not allowed.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"classify": "dirty"}, "classify='dirty' is unknown; known: clean, noised, both"),
        ({"augment": "mild"}, "augment='mild' is unknown; known: none, published"),
        ({"terms": ("diffusion", "style")}, "terms='style' is unknown; known: diffusion, class"),
        ({"terms": ()}, r"terms=\(\) must be one or more"),
        ({"weight": -1.0}, "weight=-1.0 must be 0 or more"),
    ],
)
def test_settings_are_checked_as_those_of_a_config(toy, settings, message):
    with pytest.raises(ValueError, match=rf"^config\.loss\.{message}"):
        toy.joint_loss(**settings)


@pytest.mark.parametrize("terms", [("diffusion",), ("classifier",)])
def test_a_classifier_that_joins_nothing_is_refused_by_name(toy, terms):
    message = rf"^config\.loss\.classify_after=5 .*config\.loss\.terms=\('{terms[0]}',\)"
    with pytest.raises(ValueError, match=message):
        toy.joint_loss(terms=terms, classify_after=5)


@pytest.mark.parametrize("policy", ["repaired", "digits", "natural"])
def test_a_policy_for_clean_images_needs_some(toy, policy):
    message = rf"^config\.loss\.augment='{policy}' .*config\.loss\.classify='noised'"
    with pytest.raises(ValueError, match=message):
        toy.joint_loss(classify="noised", augment=policy)


def test_min_snr_weights_of_what_has_none_are_refused_by_name(toy):
    previous = dataclasses.replace(toy.DIFFUSION, prediction="previous")
    message = r"^config\.loss\.min_snr_gamma=5\.0 .*"
    with pytest.raises(ValueError, match=message + r"config\.diffusion\.prediction='previous'"):
        toy.joint_loss(previous, min_snr_gamma=5.0)
    with pytest.raises(ValueError, match=message + r"config\.loss\.kind='kl'.*; 0 is needed"):
        toy.joint_loss(kind="kl", min_snr_gamma=5.0)
