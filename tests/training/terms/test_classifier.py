"""jdm.training.terms.classifier: inputs with no label, one, several, or mixed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdm.names import CLASSIFIED
from jdm.training.augment import POLICIES, augment
from jdm.training.terms.classifier import masked_binary_cross_entropy, masked_cross_entropy


def test_clean_images_are_classified_without_noise(toy):
    entropy = {
        classify: [
            toy.evaluate(toy.joint_loss(classify=classify), noise=seed, t=seed) for seed in (1, 2)
        ]
        for classify in CLASSIFIED
    }
    entropy = {name: [one.sums["cross_entropy"] for one in both] for name, both in entropy.items()}
    assert entropy["clean"][0] == entropy["clean"][1]
    assert entropy["noised"][0] != entropy["noised"][1]
    for seed in (0, 1):
        total = entropy["clean"][seed] + entropy["noised"][seed]
        np.testing.assert_allclose(entropy["both"][seed], total, rtol=1e-5)


def test_unlabelled_rows_change_nothing_for_the_classifier(toy):
    """The gradient is that of the mean over the labelled rows."""
    logits = jnp.asarray(toy.RNG.normal(size=(4, 3)), jnp.float32)
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


def test_accuracy_counts_the_labelled_rows(toy):
    found = toy.evaluate(toy.joint_loss(classify="clean"))
    logits = toy.X0.mean(axis=(1, 2, 3))[:, None] * np.asarray(toy.PARAMS["slope"])
    correct = logits.argmax(axis=1) == np.asarray(toy.BATCH["label"])
    assert found.sums["accuracy"] == correct.sum()
    assert found.counts["accuracy"] == 6


# Several labels to an image.


def several_labels(toy):
    """int8 [8, 3], with hidden entries."""
    return toy.RNG.integers(-1, 2, size=(8, 3)).astype(np.int8)


def test_each_label_of_several_counts_separately(toy):
    labels = several_labels(toy)
    labels[2] = -1  # nothing is known of one image, something of most
    batch = toy.BATCH | {"label": jnp.asarray(labels)}
    loss_fn = toy.joint_loss(model=toy.MODEL.clone(multi_label=True))
    found = toy.evaluate(loss_fn, batch=batch)
    slope, clock = (np.asarray(toy.PARAMS[name], np.float64) for name in ("slope", "clock"))
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


def test_a_hidden_entry_changes_nothing(toy):
    logits = jnp.asarray(toy.RNG.normal(size=(2, 3)), jnp.float32)
    labels = jnp.asarray([[1, -1, 0], [-1, -1, -1]], jnp.int8)

    def total(logits):
        return masked_binary_cross_entropy(logits, labels)[0].sum()

    grad = np.asarray(jax.grad(total)(logits))
    assert ((grad != 0) == (np.asarray(labels) >= 0)).all()


# Mixed images.


def pairs_of(toy, policy: str):
    """(partner, share) of each row as the loss draws them."""
    _, share = augment(POLICIES[policy], toy.keys()["augment"], jnp.zeros((8, 4, 4, 1)))
    return np.array([*range(1, 8), 0]), np.asarray(share, np.float64)


@pytest.mark.parametrize("classify", ["clean", "both"])
def test_a_mixed_image_counts_for_both_labels_each_with_its_share(toy, classify):
    found = toy.evaluate(toy.joint_loss(classify=classify, augment="repaired", weight=0.3))
    labels = np.asarray(toy.BATCH["label"])
    partner, share = pairs_of(toy, "repaired")
    assert (share > 0).any() and (share == 0).any()
    # Each row as if it were alone: its entropy for one label, 0 where there is none.
    own, others = (
        np.array(
            [sum(toy.entropies(found.x[8 + i][None], [0], [y])) for i, y in enumerate(of)],
        )
        for of in (labels, labels[partner])
    )
    total = ((1 - share) * own + share * others).sum()
    count = ((1 - share) * (labels >= 0) + share * (labels[partner] >= 0)).sum()
    if classify == "both":
        noised = toy.entropies(found.x[:8], found.t[:8], labels)
        total, count = total + sum(noised), count + len(noised)
    np.testing.assert_allclose(found.counts["cross_entropy"], count, rtol=1e-5)
    np.testing.assert_allclose(found.sums["cross_entropy"], total, rtol=1e-4)
    term = 0.3 * total / count
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], term, rtol=1e-4)


def test_the_published_policy_mixes_no_label(toy):
    found = toy.evaluate(toy.joint_loss(classify="clean", augment="published"))
    expected = toy.entropies(found.x[8:], found.t[8:], toy.BATCH["label"])
    np.testing.assert_allclose(found.sums["cross_entropy"], sum(expected), rtol=1e-4)
    assert found.counts["cross_entropy"] == 6


def test_a_mixed_image_of_several_labels_counts_for_both_sets(toy):
    labels = several_labels(toy)
    model = toy.MODEL.clone(multi_label=True)
    loss_fn = toy.joint_loss(model=model, classify="clean", augment="repaired")
    found = toy.evaluate(loss_fn, batch=toy.BATCH | {"label": jnp.asarray(labels)})
    partner, share = pairs_of(toy, "repaired")
    known = (labels >= 0).sum(axis=1)
    count = ((1 - share) * known + share * known[partner]).sum()
    np.testing.assert_allclose(found.counts["cross_entropy"], count, rtol=1e-5)
    term = 0.1 * found.sums["cross_entropy"] / count
    np.testing.assert_allclose(found.loss - found.sums["diffusion"], term, rtol=1e-4)
