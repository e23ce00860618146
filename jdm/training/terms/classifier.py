"""The classifier's term: the cross-entropy of its logits with the labels.

(11)  L_class = sum over labelled images of CE(y, p(y | Z)) / number of labelled images
                                                                Deja et al. 2023, section 3

Z are the encoder's representations of an image: of the clean image at t = 0, of the noised image at
its t, or of both (config.loss.classify), which count as two. In a multi-label model, CE is the
binary cross-entropy, and the sum and the number are those of known entries. An image that MixUp
mixed has two labels, and each counts with its share (15).
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jdm import names
from jdm.errors import InvalidValue
from jdm.nn.model import Logits
from jdm.training.augment import POLICIES
from jdm.training.terms.base import Input, Metrics, PerRow, Rows, Term


def masked_cross_entropy(logits: Logits, labels: Int[Array, " b"]) -> tuple[PerRow, PerRow, PerRow]:
    """(cross-entropy in nats, 1 if correct, 1 if labelled) of each row; zeros for label -1."""
    labelled = labels >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    correct = labelled & (logits.argmax(axis=-1) == labels)
    return jnp.where(labelled, entropy, 0), correct * 1.0, labelled * 1.0


def masked_binary_cross_entropy(
    logits: Logits, labels: Int[Array, "b k"]
) -> tuple[PerRow, PerRow, PerRow]:
    """The same for K labels of 0 or 1: sums over the entries of a row that are not -1."""
    labelled = labels >= 0
    entropy = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(labels, 0))
    correct = labelled & ((logits > 0) == (labels == 1))
    entropy = jnp.where(labelled, entropy, 0).sum(axis=1)
    return entropy, correct.sum(axis=1) * 1.0, labelled.sum(axis=1) * 1.0


# By model.multi_label.
ENTROPIES = {False: masked_cross_entropy, True: masked_binary_cross_entropy}

# By config.loss.classify: (whether the policy augments) -> the names of the classified inputs.
CLASSIFIED = names.CLASSIFIED.records(
    {
        "clean": lambda augments: ("clean",),
        "noised": lambda augments: ("augmented_noised",) if augments else ("noised",),
        "both": lambda augments: ("noised", "clean"),
    }
)


def classifies(loss) -> tuple[str, ...]:
    """The names of the inputs that are classified."""
    return CLASSIFIED[loss.settings.classify](POLICIES[loss.settings.augment].augments)


def mixed(given: Input, of_label: Callable) -> Any:
    """of_label(label), or for mixed images (1 - s) of_label(label) + s of_label(partner) (15)."""
    found, s = of_label(given.label), given.share
    if s is None:
        return found
    return jax.tree.map(lambda a, b: (1 - s) * a + s * b, found, of_label(given.partner))


def shares(loss, inputs, importance: PerRow, step: Int[Array, ""]) -> PerRow:
    """lambda / number of labels (9, 11), for each row; lambda is 0 before step classify_after."""

    def known(label):
        return (label >= 0).reshape(len(label), -1).sum(axis=1)

    labels = sum(mixed(inputs[name], known).sum() for name in classifies(loss))
    weight = jnp.where(step >= loss.settings.classify_after, loss.settings.weight, 0.0)
    # The number of labels may be 0, and with mixed images between 0 and 1.
    share = jnp.where(labels > 0, weight / jnp.where(labels > 0, labels, 1), 0.0)
    return jnp.broadcast_to(share, importance.shape)


def values(loss, rows: Rows, outputs) -> tuple[PerRow, Metrics]:
    """The cross-entropy of each row, summed over its inputs. Logs its mean and the accuracy."""
    entropies, inputs = ENTROPIES[loss.model.multi_label], rows.inputs
    found = [mixed(inputs[k], partial(entropies, outputs[k].logits)) for k in classifies(loss)]
    entropy, correct, labels = jax.tree.map(lambda *x: reduce(jnp.add, x), *found)
    count = labels.sum()
    return entropy, {"cross_entropy": (entropy.sum(), count), "accuracy": (correct.sum(), count)}


def check(loss) -> None:
    """Raises InvalidValue for a policy, or a late start, that contradicts other settings."""
    settings, images, policy = loss.settings, loss.settings.classify, loss.settings.augment
    if "augmented_noised" in classifies(loss) and not POLICIES[policy].noised:
        allowed = f"is for clean images, which config.loss.classify={images!r} leaves out"
        hint = "take config.loss.classify='clean' or 'both', or config.loss.augment='none'"
        raise InvalidValue("config.loss.augment", policy, allowed, hint)
    if settings.classify_after and not {"classifier"} < set(settings.terms):
        allowed = f"does not go with config.loss.terms={tuple(settings.terms)}"
        hint = "0 is needed, or the classifier together with another term"
        raise InvalidValue("config.loss.classify_after", settings.classify_after, allowed, hint)


TERM = Term(shares, values, check, classifies=classifies)
