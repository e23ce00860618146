"""jdm.training.loss with toy networks whose every output is known."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.configs import base
from jdm.diffusion.process import MIN_SNR_WEIGHTS, Diffusion
from jdm.nn.model import JointModel
from jdm.nn.unet import Features
from jdm.training.augment import POLICIES, augment
from jdm.training.loss import (
    CLASSIFY,
    KINDS,
    JointLoss,
    masked_binary_cross_entropy,
    masked_cross_entropy,
)
from jdm.training.t_sampler import T_SAMPLERS

SEEN = []  # what the toy's encoder was given, in order
ASKED = []  # what else it was asked to do


class Toy(JointModel):
    """Decodes to the parameter `raw`; its logits are image mean · `slope` + t · `clock`."""

    def setup(self):
        pass

    def encode(self, x, t, nudges=None, train=False):
        assert train
        SEEN.append((x, t))
        return Features(x, (t.astype(jnp.float32),))

    def decode(self, features, t, train=False):
        ASKED.append("decode")
        raw = self.get_variable("params", "raw")
        return jnp.broadcast_to(raw, (*features.mid.shape[:3], raw.shape[-1]))

    def classify(self, features, t, train=False):
        ASKED.append("classify")
        (times,) = features.skips  # the time the encoder had is the time the head has
        t = t + 0 * times
        slope, clock = (self.get_variable("params", name) for name in ("slope", "clock"))
        return features.mid.mean(axis=(1, 2, 3))[:, None] * slope + t[:, None] * clock


DIFFUSION = Diffusion(50)
MODEL_FIELDS = dict(base.get_config().model)
MODEL = Toy(**MODEL_FIELDS)
PARAMS = {
    "raw": jnp.zeros(1),
    "slope": jnp.asarray([1.0, -2.0, 0.5]),
    "clock": jnp.asarray([0.01, 0.0, -0.02]),
}
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, size=(8, 4, 4, 1)), jnp.uint8),
    "label": jnp.asarray([0, 1, 2, -1, 1, -1, 0, 2], jnp.int32),
}


def keys(seed: int = 0, **changed: int):
    return {
        name: jax.random.key(10 * changed.get(name, seed) + i)
        for i, name in enumerate(("t", "noise", "dropout"))
    }


def joint_loss(diffusion=DIFFUSION, **settings) -> JointLoss:
    settings = {**base.get_config().loss, **settings}
    return JointLoss(MODEL, diffusion, **settings)


def whole_loss(loss_fn, params, batch, drawn, step=0, batch_stats=()):
    """(the loss, its averages, the next batch_stats) of a batch with evenly drawn times."""
    count = len(batch["image"])
    t, counts = T_SAMPLERS["uniform"](loss_fn.diffusion.steps).draw(drawn["t"], None, count)
    rows = loss_fn.rows(batch, t, counts, drawn, jnp.int32(step))
    loss, aux = loss_fn(params, dict(batch_stats), rows, drawn["dropout"])
    batch_stats, averages, _ = aux
    return loss, averages, batch_stats


def evaluate(loss_fn, params=PARAMS, batch=BATCH, step=0, **changed):
    """The loss, sums and counts of the averages, and what the encoder saw.

    Not compiled: small operations are compiled once for all tests, a whole loss for each.
    """
    SEEN.clear()
    ASKED.clear()
    loss, averages, _ = whole_loss(loss_fn, params, batch, keys(**changed), step)
    ((x, t),) = SEEN  # one encoder pass
    return SimpleNamespace(
        loss=float(loss),
        sums={name: float(total) for name, (total, _) in averages.items()},
        counts={name: float(count) for name, (_, count) in averages.items()},
        x=x,
        t=t,
    )


def pixels(value: float, size: int, channels: int = 1, rows: int = 8):
    """(images of one grey value, the float that stands for it)."""
    level = round((value + 1) * 127.5)
    images = jnp.full((rows, size, size, channels), level, jnp.uint8)
    return {"image": images, "label": jnp.full((rows,), -1, jnp.int32)}, level / 127.5 - 1


def entropies(x, t, labels):
    """Cross-entropy of each labelled row, from the toy's closed form in float64."""
    slope, clock = (np.asarray(PARAMS[name], np.float64) for name in ("slope", "clock"))
    mean = np.asarray(x, np.float64).mean(axis=(1, 2, 3))
    logits = mean[:, None] * slope + np.asarray(t)[:, None] * clock
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [-log_p[i, label] for i, label in enumerate(np.asarray(labels)) if label >= 0]


# What the network is asked.


def test_the_encoder_sees_the_noised_images_and_the_clean_ones_at_time_zero():
    seen = evaluate(joint_loss(classify="both", weight=0.0))
    x0 = np.asarray(BATCH["image"]) / 127.5 - 1
    np.testing.assert_allclose(seen.x[8:], x0, atol=1e-6)
    np.testing.assert_array_equal(seen.t[8:], np.zeros(8))
    noised = evaluate(joint_loss(classify="noised"))
    np.testing.assert_array_equal(noised.x, seen.x[:8])
    np.testing.assert_array_equal(noised.t, seen.t[:8])


def test_noise_and_times_are_drawn_from_streams_of_their_own():
    loss_fn = joint_loss(classify="noised")
    base_seen = evaluate(loss_fn)
    other_noise, other_t = (evaluate(loss_fn, **{name: 7}) for name in ("noise", "t"))
    np.testing.assert_array_equal(other_noise.t, base_seen.t)
    assert np.abs(other_noise.x - base_seen.x).min() > 0
    assert (other_t.t != base_seen.t).any()


def test_times_cover_the_whole_chain_evenly_and_noise_is_standard_normal():
    batch, x0 = pixels(0.2, size=4, rows=4000)
    diffusion = Diffusion(25)
    loss_fn = joint_loss(diffusion, classify="noised")

    @jax.jit
    def inputs():
        SEEN.clear()
        whole_loss(loss_fn, PARAMS, batch, keys())
        return SEEN[0]

    x, t = (np.asarray(seen) for seen in inputs())
    counts = np.bincount(t, minlength=25)
    assert counts.shape == (25,) and t.dtype == np.int32
    assert np.abs(counts - 160).max() < 5 * np.sqrt(160)
    abar = diffusion.abar[t][:, None, None, None]
    eps = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    assert abs(eps.mean()) < 4 / np.sqrt(64000) and abs(eps.var() - 1) < 4 * np.sqrt(2 / 64000)


def test_a_network_that_knows_nothing_has_the_mean_square_of_the_noise_as_its_error():
    found = evaluate(joint_loss(classify="noised", weight=0.0))
    abar = DIFFUSION.abar[np.asarray(found.t)][:, None, None, None]
    x0 = np.asarray(BATCH["image"]) / 127.5 - 1
    eps = (np.asarray(found.x) - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    np.testing.assert_allclose(found.loss, (eps**2).mean(), rtol=1e-4)
    assert found.sums["diffusion"] == found.loss


@pytest.mark.parametrize("size, channels", [(2, 1), (16, 3)])
def test_the_error_is_a_mean_over_pixels_and_channels(size, channels):
    batch, x0 = pixels(0.6, size, channels)
    loss_fn = joint_loss(dataclasses.replace(DIFFUSION, prediction="x0"), classify="noised")
    raw = 0.1 + jnp.zeros(channels)  # off by x0 - 0.1 at every pixel
    assert np.isclose(evaluate(loss_fn, PARAMS | {"raw": raw}, batch).loss, (x0 - 0.1) ** 2)


@pytest.mark.parametrize("prediction", MIN_SNR_WEIGHTS)
def test_errors_are_weighted_by_min_snr_and_reported_unweighted(prediction):
    batch, x0 = pixels(-0.4, size=4)
    diffusion = dataclasses.replace(DIFFUSION, prediction=prediction)
    found = evaluate(joint_loss(diffusion, classify="noised", min_snr_gamma=2.0), batch=batch)
    t = np.asarray(found.t)
    snr = diffusion.abar[t] / (1 - diffusion.abar[t])
    weight = np.minimum(snr, 2) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
    a, b = (np.sqrt(q)[t][:, None, None, None] for q in (diffusion.abar, 1 - diffusion.abar))
    eps = (np.asarray(found.x) - a * x0) / b
    target = {"eps": eps, "x0": x0 + 0 * eps, "v": a * eps - b * x0}[prediction]
    error = (target**2).mean(axis=(1, 2, 3))  # the network says 0
    np.testing.assert_allclose(found.loss, (weight * error).mean(), rtol=1e-4)
    np.testing.assert_allclose(found.sums["diffusion"], error.mean(), rtol=1e-4)


# The classifier's term.


@pytest.mark.parametrize("classify", CLASSIFY)
def test_the_classifier_is_trained_on_the_inputs_that_are_named(classify):
    found = evaluate(joint_loss(classify=classify, weight=0.3))
    x, t, labels = found.x, found.t, BATCH["label"]
    rows = {"clean": slice(8, 16), "noised": slice(0, 8), "both": slice(0, 16)}[classify]
    expected = entropies(x[rows], t[rows], jnp.concatenate([labels, labels])[rows])
    assert found.counts["cross_entropy"] == len(expected) == (12 if classify == "both" else 6)
    np.testing.assert_allclose(found.sums["cross_entropy"], sum(expected), rtol=1e-4)
    term = 0.3 * sum(expected) / len(expected)
    np.testing.assert_allclose(found.loss, found.sums["diffusion"] + term, rtol=1e-5)


def test_clean_images_are_classified_without_noise_in_the_answer():
    entropy = {
        classify: [
            evaluate(joint_loss(classify=classify), noise=seed, t=seed).sums["cross_entropy"]
            for seed in (1, 2)
        ]
        for classify in CLASSIFY
    }
    assert entropy["clean"][0] == entropy["clean"][1]
    assert entropy["noised"][0] != entropy["noised"][1]
    for seed in (0, 1):
        halves = entropy["clean"][seed] + entropy["noised"][seed]
        np.testing.assert_allclose(entropy["both"][seed], halves, rtol=1e-5)


class Counting(Toy):
    """Keeps the sum of the pixels that its head was given."""

    def classify(self, features, t, train=False):
        seen = self.get_variable("batch_stats", "seen")
        self.put_variable("batch_stats", "seen", seen + features.mid.sum())
        return super().classify(features, t, train)


@pytest.mark.parametrize("classify", CLASSIFY)
def test_the_heads_statistics_are_those_of_what_it_was_given(classify):
    loss_fn = dataclasses.replace(joint_loss(classify=classify), model=Counting(**MODEL_FIELDS))
    SEEN.clear()
    before = {"seen": jnp.float32(100)}
    _, _, batch_stats = whole_loss(loss_fn, PARAMS, BATCH, keys(), batch_stats=before)
    ((x, _),) = SEEN
    rows = {"clean": slice(8, 16), "noised": slice(0, 8), "both": slice(0, 16)}[classify]
    np.testing.assert_allclose(batch_stats["seen"], 100 + x[rows].sum(), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.001, 1.0, 10.0])
def test_lambda_scales_the_classifiers_term_alone(weight):
    found = evaluate(joint_loss(weight=weight))
    mean = found.sums["cross_entropy"] / found.counts["cross_entropy"]
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], weight * mean, atol=1e-5)


def gradient(loss_fn, params=PARAMS, batch=BATCH):
    return jax.grad(lambda params: whole_loss(loss_fn, params, batch, keys())[0])(params)


def test_unlabelled_rows_change_nothing_for_the_classifier():
    """The gradient is that of the mean over the labelled rows."""
    logits = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    labels = jnp.asarray([2, -1, 0, -1], jnp.int32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def value_and_grad(logits):
        total, correct, count = (each.sum() for each in masked_cross_entropy(logits, labels))
        return total, (correct, count)

    (total, (correct, count)), grad = value_and_grad(logits)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(total, -log_p[0, 2] - log_p[2, 0], rtol=1e-6)
    assert count == 2
    assert correct == (logits[0].argmax() == 2) + (logits[2].argmax() == 0)
    np.testing.assert_array_equal(grad[1::2], np.zeros((2, 3)))
    assert np.abs(grad[0::2]).min() > 0
    (moved, _), _ = value_and_grad(logits.at[1].set(1e4).at[3].set(-1e4))
    assert moved == total


def test_a_batch_without_labels_trains_the_diffusion_alone():
    batch = BATCH | {"label": jnp.full((8,), -1, jnp.int32)}
    loss_fn = joint_loss(weight=10.0)
    found = evaluate(loss_fn, batch=batch)
    assert found.loss == found.sums["diffusion"]
    assert (found.sums["cross_entropy"], found.counts["cross_entropy"]) == (0, 0)
    grads = gradient(loss_fn, batch=batch)
    np.testing.assert_array_equal(grads["slope"], np.zeros(3))
    np.testing.assert_array_equal(grads["clock"], np.zeros(3))
    assert np.abs(grads["raw"]).min() > 0
    assert np.abs(gradient(loss_fn)["slope"]).min() > 0


def test_accuracy_counts_the_labelled_rows():
    found = evaluate(joint_loss(classify="clean"))
    x0 = np.asarray(BATCH["image"]) / 127.5 - 1
    guess = (x0.mean(axis=(1, 2, 3))[:, None] * np.asarray(PARAMS["slope"])).argmax(axis=1)
    assert found.sums["accuracy"] == (guess == np.asarray(BATCH["label"])).sum()
    assert found.counts["accuracy"] == 6


def test_an_unknown_name_is_one_sentence_that_lists_the_known():
    with pytest.raises(
        ValueError, match="^loss.classify='dirty' is unknown; known: clean, noised, both$"
    ):
        joint_loss(classify="dirty")


# Several labels to an image.


def test_each_label_of_several_counts_for_itself():
    labels = RNG.integers(-1, 2, size=(8, 3)).astype(np.int8)
    labels[2] = -1  # nothing is known of one image, something of most
    batch = BATCH | {"label": jnp.asarray(labels)}
    loss_fn = JointLoss(MODEL.clone(multi_label=True), DIFFUSION, **base.get_config().loss)
    found = evaluate(loss_fn, batch=batch)
    slope, clock = (np.asarray(PARAMS[name], np.float64) for name in ("slope", "clock"))
    mean = np.asarray(found.x, np.float64).mean(axis=(1, 2, 3))[:, None]
    logits = mean * slope + np.asarray(found.t)[:, None] * clock
    twice = np.concatenate([labels, labels])  # the noised images and the clean ones
    p = 1 / (1 + np.exp(-logits))
    entropy = -np.where(twice == 1, np.log(p), np.log(1 - p))[twice >= 0]
    assert found.counts["cross_entropy"] == len(entropy) == 2 * (labels >= 0).sum()
    np.testing.assert_allclose(found.sums["cross_entropy"], entropy.sum(), rtol=1e-5)
    assert found.sums["accuracy"] == ((p > 0.5) == twice)[twice >= 0].sum()
    expected = found.sums["diffusion"] + 0.1 * entropy.mean()
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_a_hidden_entry_changes_nothing():
    logits = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
    labels = jnp.asarray([[1, -1, 0], [-1, -1, -1]], jnp.int8)

    def total(logits):
        return masked_binary_cross_entropy(logits, labels)[0].sum()

    grad = np.asarray(jax.grad(total)(logits))
    assert ((grad != 0) == (np.asarray(labels) >= 0)).all()


# One term without the other.


@pytest.mark.parametrize("classify", CLASSIFY)
def test_a_term_that_is_left_out_is_not_computed_and_the_other_is_as_it_was(classify):
    joint = evaluate(joint_loss(classify=classify, weight=0.3))
    entropy = 0.3 * joint.sums["cross_entropy"] / joint.counts["cross_entropy"]
    noised, clean = joint.x[:8], BATCH["image"] / 127.5 - 1
    # What the encoder of the joint loss is given: the noised, and the clean where they are asked.
    assert ASKED == ["decode", "classify"] and len(joint.x) == (8 if classify == "noised" else 16)

    diffusion = evaluate(joint_loss(classify=classify, terms="diffusion"))
    assert ASKED == ["decode"]
    assert set(diffusion.sums) == {"diffusion"}
    np.testing.assert_array_equal(diffusion.x, noised)
    np.testing.assert_allclose(diffusion.loss, joint.sums["diffusion"], rtol=1e-6)

    alone = evaluate(joint_loss(classify=classify, terms="classifier", weight=0.3))
    assert ASKED == ["classify"]
    assert set(alone.sums) == {"cross_entropy", "accuracy"}
    np.testing.assert_allclose(alone.loss, entropy, rtol=1e-5)
    expected = {"clean": [clean], "noised": [noised], "both": [noised, clean]}[classify]
    np.testing.assert_allclose(alone.x, np.concatenate(expected), atol=1e-6)


def test_the_classifier_joins_at_its_step():
    late, start = joint_loss(classify_after=3), joint_loss()
    for step in range(5):
        found, expected = evaluate(late, step=step), evaluate(start, step=step)
        assert found.loss == (expected.loss if step >= 3 else expected.sums["diffusion"])
        assert found.sums == expected.sums  # what is reported does not wait


@pytest.mark.parametrize("terms", ["diffusion", "classifier"])
def test_a_classifier_that_joins_nothing_is_refused_by_name(terms):
    with pytest.raises(ValueError, match=rf"^loss\.classify_after=5 .* loss\.terms='{terms}'"):
        joint_loss(terms=terms, classify_after=5)


# Augmentation. `keys` above has no stream for it: without a policy none is asked for.


class WithStream(JointLoss):
    def rows(self, batch, t, counts, keys, step):
        return super().rows(batch, t, counts, keys | {"augment": jax.random.key(99)}, step)


def augmented(policy: str, **settings) -> JointLoss:
    return WithStream(MODEL, DIFFUSION, **{**base.get_config().loss, "augment": policy, **settings})


def by_hand(policy: str, images):
    """(images augmented as the loss does, their pairs)."""
    return augment(POLICIES[policy], jax.random.key(99), images)


def test_the_policy_none_changes_no_bit():
    plain, none = evaluate(joint_loss()), evaluate(augmented("none"))
    assert base.get_config().loss.augment == "none"
    assert (plain.loss, plain.sums) == (none.loss, none.sums)
    np.testing.assert_array_equal(plain.x, none.x)


@pytest.mark.parametrize("classify", ["clean", "both"])
def test_only_the_clean_half_is_augmented(classify):
    plain = evaluate(joint_loss(classify=classify))
    found = evaluate(augmented("digits", classify=classify))
    np.testing.assert_array_equal(found.x[:8], plain.x[:8])
    np.testing.assert_array_equal(found.t, plain.t)
    assert found.sums["diffusion"] == plain.sums["diffusion"]
    expected, pairs = by_hand("digits", plain.x[8:])
    assert pairs is None
    np.testing.assert_allclose(found.x[8:], expected, atol=1e-5)
    assert np.abs(found.x[8:] - plain.x[8:]).mean() > 0.01
    assert found.sums["cross_entropy"] != plain.sums["cross_entropy"]


@pytest.mark.parametrize("classify", ["clean", "both"])
def test_mixed_images_are_asked_for_both_labels_each_for_its_share(classify):
    found = evaluate(augmented("repaired", classify=classify, weight=0.3))
    labels = np.asarray(BATCH["label"])
    _, (partner, share) = by_hand("repaired", jnp.zeros((8, 4, 4, 1)))
    partner, share = np.asarray(partner), np.asarray(share, np.float64)
    assert (share > 0).any() and (share == 0).any()
    # Each row as if it were alone: its entropy for one label, 0 where there is none.
    own, others = (
        np.array(
            [sum(entropies(found.x[8 + i][None], [0], [y])) for i, y in enumerate(of)],
        )
        for of in (labels, labels[partner])
    )
    total = ((1 - share) * own + share * others).sum()
    count = ((1 - share) * (labels >= 0) + share * (labels[partner] >= 0)).sum()
    if classify == "both":
        noised = entropies(found.x[:8], found.t[:8], labels)
        total, count = total + sum(noised), count + len(noised)
    np.testing.assert_allclose(found.counts["cross_entropy"], count, rtol=1e-5)
    np.testing.assert_allclose(found.sums["cross_entropy"], total, rtol=1e-4)
    term = 0.3 * total / count
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], term, rtol=1e-4)


def test_the_published_policy_mixes_no_label():
    found = evaluate(augmented("published", classify="clean"))
    expected = entropies(found.x[8:], found.t[8:], BATCH["label"])
    np.testing.assert_allclose(found.sums["cross_entropy"], sum(expected), rtol=1e-4)
    assert found.counts["cross_entropy"] == 6


def test_the_published_policy_augments_noised_images_where_those_are_classified():
    plain = evaluate(joint_loss(classify="noised"))
    found = evaluate(augmented("published", classify="noised"))
    np.testing.assert_array_equal(found.x[:8], plain.x)
    np.testing.assert_array_equal(found.t, np.tile(plain.t, 2))
    np.testing.assert_allclose(found.x[8:], by_hand("published", plain.x)[0], atol=1e-5)
    expected = entropies(found.x[8:], found.t[8:], BATCH["label"])
    np.testing.assert_allclose(found.sums["cross_entropy"], sum(expected), rtol=1e-4)
    assert found.sums["diffusion"] == plain.sums["diffusion"]


def test_a_mixed_image_of_several_labels_is_asked_for_both_sets():
    labels = RNG.integers(-1, 2, size=(8, 3)).astype(np.int8)
    several = dataclasses.replace(
        augmented("repaired", classify="clean"), model=MODEL.clone(multi_label=True)
    )
    found = evaluate(several, batch=BATCH | {"label": jnp.asarray(labels)})
    _, (partner, share) = by_hand("repaired", jnp.zeros((8, 4, 4, 1)))
    share, known = np.asarray(share, np.float64), (labels >= 0).sum(axis=1)
    count = ((1 - share) * known + share * known[np.asarray(partner)]).sum()
    np.testing.assert_allclose(found.counts["cross_entropy"], count, rtol=1e-5)
    term = 0.1 * found.sums["cross_entropy"] / count
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], term, rtol=1e-4)


@pytest.mark.parametrize("policy", ["repaired", "digits", "natural"])
def test_a_policy_for_clean_images_needs_some(policy):
    with pytest.raises(ValueError, match=f"^loss.augment='{policy}' .*loss.classify='noised'"):
        joint_loss(classify="noised", augment=policy)


def test_an_unknown_policy_is_one_sentence_that_lists_the_known():
    with pytest.raises(ValueError, match="^loss.augment='mild' is unknown; known: none, published"):
        joint_loss(augment="mild")


# Learned variance.


def test_the_bound_trains_the_variance_and_leaves_the_mean_to_the_error():
    diffusion = dataclasses.replace(DIFFUSION, variance="learned")
    params = PARAMS | {"raw": jnp.asarray(RNG.normal(size=(8, 4, 4, 2)), jnp.float32)}
    off, weak, strong = (
        gradient(joint_loss(diffusion, variance_weight=weight), params)["raw"]
        for weight in (0.0, 0.001, 0.002)
    )
    np.testing.assert_array_equal(off[..., 1:], np.zeros((8, 4, 4, 1)))
    assert np.abs(off[..., :1]).min() > 0
    np.testing.assert_allclose(weak[..., :1], off[..., :1], rtol=1e-5)  # the mean half
    assert np.abs(weak[..., 1:]).min() > 0
    np.testing.assert_allclose(strong[..., 1:], 2 * weak[..., 1:], rtol=1e-4)


def test_the_bound_is_scaled_to_the_whole_chain():
    diffusion = dataclasses.replace(DIFFUSION, variance="learned")
    params = PARAMS | {"raw": jnp.asarray(RNG.normal(size=(8, 4, 4, 2)), jnp.float32)}
    found = evaluate(joint_loss(diffusion, classify="noised", weight=0.0), params)
    x0 = jnp.asarray(np.asarray(BATCH["image"]) / 127.5 - 1, jnp.float32)
    estimate = diffusion.estimate(params["raw"], found.x, found.t)
    bound = diffusion.bound(estimate, x0, found.x, found.t).mean()
    extra = found.loss - found.sums["diffusion"]
    np.testing.assert_allclose(extra, 0.001 * 50 * bound, rtol=1e-4)


# The variational bound as the loss.


def random_raw(channels: int):
    """Parameters under which every pixel of every row has an output of its own."""
    return PARAMS | {"raw": jnp.asarray(RNG.normal(size=(8, 4, 4, channels)), jnp.float32)}


@pytest.mark.parametrize("variance, channels", [("fixed_large", 1), ("learned", 2)])
def test_the_loss_is_the_bound_and_rescaled_the_bound_of_the_whole_chain(variance, channels):
    diffusion, params = dataclasses.replace(DIFFUSION, variance=variance), random_raw(channels)
    found = {
        kind: evaluate(joint_loss(diffusion, kind=kind, classify="noised", weight=0.0), params)
        for kind in KINDS
    }
    seen = found["kl"]
    x0 = jnp.asarray(np.asarray(BATCH["image"]) / 127.5 - 1, jnp.float32)
    estimate = diffusion.estimate(params["raw"], seen.x, seen.t)
    bound = diffusion.bound(estimate, x0, seen.x, seen.t).mean()
    np.testing.assert_allclose(seen.loss, bound, rtol=1e-4)
    np.testing.assert_allclose(found["rescaled_kl"].loss, 50 * bound, rtol=1e-4)
    # What is reported is the squared error, whatever is trained.
    assert len({one.sums["diffusion"] for one in found.values()}) == 1


def test_the_gradient_of_the_bound_reaches_the_mean_and_the_variance():
    diffusion, params = dataclasses.replace(DIFFUSION, variance="learned"), random_raw(2)
    loss_fn = joint_loss(diffusion, kind="kl", classify="noised", weight=0.0, variance_weight=0.0)
    grad = np.asarray(gradient(loss_fn, params)["raw"])
    seen = evaluate(loss_fn, params)
    # At t > 0 the mean is in the bound as (mu~ - mu)² / (2 sigma²), mu = mu~ + k (eps - eps_hat).
    t = np.asarray(seen.t)
    later = t > 0
    assert later.sum() > 5 and np.abs(grad[later, ..., 1:]).min() > 0
    abar, abar_s = diffusion.abar[t], np.append(1, diffusion.abar)[t]
    k = np.sqrt(abar_s) * (1 - abar / abar_s) / (1 - abar) * np.sqrt((1 - abar) / abar)
    a, b, k = (x[:, None, None, None] for x in (np.sqrt(abar), np.sqrt(1 - abar), k))
    x0 = np.asarray(BATCH["image"]) / 127.5 - 1
    eps = (np.asarray(seen.x) - a * x0) / b
    log_variance = np.asarray(diffusion.estimate(params["raw"], seen.x, seen.t).log_variance)
    slope = k**2 * (np.asarray(params["raw"])[..., :1] - eps) / np.exp(log_variance)
    expected = (slope / np.log(2) / eps.size)[later]
    np.testing.assert_allclose(grad[later, ..., :1], expected, rtol=1e-2, atol=1e-5)


def test_min_snr_weights_of_what_has_none_are_refused_by_name():
    previous = dataclasses.replace(DIFFUSION, prediction="previous")
    with pytest.raises(
        ValueError, match=r"^loss\.min_snr_gamma=5\.0 .* diffusion\.prediction='prev"
    ):
        joint_loss(previous, min_snr_gamma=5.0)
    with pytest.raises(ValueError, match=r"^loss\.min_snr_gamma=5\.0 .* loss\.kind='kl'; 0 is"):
        joint_loss(kind="kl", min_snr_gamma=5.0)
