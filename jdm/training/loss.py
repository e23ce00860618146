"""The joint loss: how well the noise is seen, plus how well the class is.

Owns what the network is asked at each step. Does not know optimisers.

(9)   L = L_diffusion + lambda · L_class                             Deja et al. 2023, section 3
(10)  L_diffusion = mean over batch, H, W, C of w(t) (target - prediction)²
(11)  L_class = sum over labelled inputs of CE(y, p(y | Z)) / their number; the inputs are the clean
      images at t = 0, the noised ones at their own t, or both; Z is the encoder's representations;
      with K labels each, sum over entries of the binary CE / the number of entries that are known;
      clean images are augmented as the policy says (jdm.training.augment), and a mixed one has two
      labels, each with its share
(12)  learned variance adds b · T · bound(t), which trains the variance alone: the estimate of the
      noise is held fixed inside it                                  Nichol & Dhariwal 2021, eq. 16
(10b) the variational bound itself in place of (10): L_diffusion = mean of bound(t) for "kl", of
      T · bound(t), an estimate of the whole chain's, for "rescaled_kl"; in bits per dimension
                                                                     Ho et al. 2020, eq. 5
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jdm.diffusion.process import (
    MIN_SNR_WEIGHTS,
    Diffusion,
    Images,
    Times,
    pick,
    pixels_to_float,
)
from jdm.nn.model import JointModel
from jdm.training.augment import POLICIES, augment

# Which terms of (9) are computed and trained.
TERMS = ("joint", "diffusion", "classifier")

# What the classifier is trained on: clean images, noised ones, or both.
CLASSIFY = ("clean", "noised", "both")

# What L_diffusion is: the squared error (10), or (10b) with its factor of the bound: T -> factor.
BOUND_FACTORS = {"kl": lambda steps: 1, "rescaled_kl": lambda steps: steps}
KINDS = ("mse", *BOUND_FACTORS)

# One number of one step, to be summed over steps before it is divided: (sum, count).
Average = tuple[Float[Array, ""], Float[Array, ""]]
Labels = Int[Array, "b ..."]


class Own(NamedTuple):
    """The images that the classifier has to itself: the clean ones, augmented.

    x: [B, H, W, C]. t: their noise level, int32 [B]. partner: a second label of each, as those of
    `JointLoss.rows`, and mixed, what it counts for, in [0, 1], float32 [B]; None where the policy
    mixes no labels.
    """

    x: Images
    t: Times
    partner: Labels | None = None
    mixed: Float[Array, " b"] | None = None


class Rows(NamedTuple):
    """What is asked about each row of a batch, and what its answers add to the loss.

    The sums over a batch are divided before they are taken: a row carries its share, so that the
    loss of a batch is the sum of those of its parts, however the labels lie in them.

    x0, xt, eps: [B, H, W, C]. t: int32 [B]. label: see `JointLoss.rows`. own: None where the
    classifier sees xt alone, or nothing. share: of its part of (10), what it counts over the number
    of rows. class_share: of its part of (11), lambda over the number of labels among all inputs.
    """

    x0: Images
    xt: Images
    t: Times
    eps: Images
    label: Labels
    own: Own | None
    share: Float[Array, " b"]
    class_share: Float[Array, " b"]


def masked_cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"]
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """(cross-entropy in nats, correct, labelled) of each row, 0 where the label is -1."""
    labelled = labels >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    correct = labelled & (logits.argmax(axis=-1) == labels)
    return jnp.where(labelled, entropy, 0), correct * 1.0, labelled * 1.0


def masked_binary_cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, "b k"]
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """The same of K answers, 0 or 1, to each row: sums over those that are not -1."""
    labelled = labels >= 0
    entropy = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(labels, 0))
    correct = labelled & ((logits > 0) == (labels == 1))
    each = jnp.where(labelled, entropy, 0), correct * 1.0, labelled * 1.0
    return tuple(one.sum(axis=1) for one in each)


# (11) of each row, by model.multi_label.
ENTROPIES = {False: masked_cross_entropy, True: masked_binary_cross_entropy}


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """The joint loss of a model under a diffusion.

    terms: which are there, one of TERMS. kind: of the diffusion term, one of KINDS. weight: lambda
    of (9). classify: which inputs the classifier is trained on, one of CLASSIFY. classify_after:
    lambda is 0 in so many first steps. augment: what is done to the clean ones, one of POLICIES.
    min_snr_gamma: gamma of the min-SNR weights of (10), 0 for uniform weights. variance_weight: b
    of (12), used where the variance is learned and the kind is "mse"; the bound trains mean and
    variance alike.

    Raises ValueError, naming the config key, for an unknown name, for min-SNR weights where (6) has
    none, for a classifier that is to join no other term, and for a policy that needs clean images
    where the classifier has none.
    """

    model: JointModel
    diffusion: Diffusion
    terms: str
    kind: str
    weight: float
    classify: str
    classify_after: int
    augment: str
    min_snr_gamma: float
    variance_weight: float

    def __post_init__(self):
        pick("loss.terms", self.terms, TERMS)
        pick("loss.kind", self.kind, KINDS)
        pick("loss.classify", self.classify, CLASSIFY)
        policy = POLICIES[pick("loss.augment", self.augment, POLICIES)]
        if self.classify == "noised" and not policy.noised:
            raise ValueError(
                f"loss.augment={self.augment!r} is for clean images, which "
                "loss.classify='noised' leaves out; take loss.classify='clean' or 'both', or "
                "loss.augment='none'"
            )
        if self.classify_after and self.terms != "joint":
            raise ValueError(
                f"loss.classify_after={self.classify_after} does not go with "
                f"loss.terms={self.terms!r}; 0 is needed, or joint"
            )
        if self.min_snr_gamma and self.kind != "mse":
            raise ValueError(
                f"loss.min_snr_gamma={self.min_snr_gamma} weighs squared errors and does not go "
                f"with loss.kind={self.kind!r}; 0 is needed"
            )
        if self.min_snr_gamma and self.diffusion.prediction not in MIN_SNR_WEIGHTS:
            raise ValueError(
                f"loss.min_snr_gamma={self.min_snr_gamma} does not go with "
                f"diffusion.prediction={self.diffusion.prediction!r}; 0 is needed, or one of "
                f"{', '.join(MIN_SNR_WEIGHTS)}"
            )

    @property
    def decoded(self) -> set[str]:
        """The halves of the encoder's batch ("noised", "own") that are decoded."""
        return set() if self.terms == "classifier" else {"noised"}

    @property
    def classified(self) -> set[str]:
        """Those that are classified. Noised images that are augmented are the classifier's own."""
        if self.terms == "diffusion":
            return set()
        if self.classify == "both":
            return {"noised", "own"}
        plain = self.classify == "noised" and self.augment == "none"
        return {"noised"} if plain else {"own"}

    def rows(
        self,
        batch: dict[str, Array],
        t: Times,
        counts: Float[Array, " b"],
        keys: dict[str, Key[Array, ""]],
        step: Int[Array, ""],
    ) -> Rows:
        """The rows of a batch {image: uint8 [B, H, W, C], label: int32 [B]}, -1 = unlabelled.

        Of a multi-label model label is int8 [B, K] of 0 and 1; -1 takes out that entry alone.
        t: their noise levels. counts: what each counts in (10). keys: the streams noise and, under
        a policy, augment. step: how many were done before.
        """
        x0, label = pixels_to_float(batch["image"]), batch["label"]
        eps = jax.random.normal(keys["noise"], x0.shape)
        xt = self.diffusion.q_sample(x0, t, eps)
        known = (label >= 0).reshape(len(t), -1).sum(axis=1)
        labels = {"noised": known.sum(), "own": known.sum()}
        own = None
        if "own" in self.classified:
            own = Own(xt, t) if self.classify == "noised" else Own(x0, jnp.zeros_like(t))
        if own is not None and self.augment != "none":
            x, pairs = augment(POLICIES[self.augment], keys["augment"], own.x)
            own = own._replace(x=x)
            if pairs is not None:
                own = own._replace(partner=label[pairs.partner], mixed=pairs.share)
                labels["own"] = _mix(known, known[pairs.partner], pairs.share).sum()
        inputs = sum(labels[half] for half in self.classified)
        weight = jnp.where(step >= self.classify_after, self.weight, 0.0)
        # A mixed batch may have a fraction of one label; without any, there is nothing to divide.
        class_share = jnp.where(inputs > 0, weight / jnp.where(inputs > 0, inputs, 1), 0.0)
        class_share = jnp.broadcast_to(class_share, t.shape)
        return Rows(x0, xt, t, eps, label, own, counts / len(t), class_share)

    def __call__(
        self, params, batch_stats, rows: Rows, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Average], Float[Array, " b"]]]:
        """(what the rows add to L, (batch_stats, averages, the diffusion term of each row)).

        batch_stats: the head's, as they were and as they are after these rows. key: of the dropout.
        The averages are pairs (sum, count). A term that is left out has none, and is 0.
        """
        weights = {"params": params, "batch_stats": batch_stats}
        raw, logits, batch_stats = self._network(weights, rows, key)
        loss, term, averages = jnp.zeros(()), jnp.zeros(rows.t.shape), {}
        if raw is not None:
            term, error = self._diffusion_term(raw, rows)
            loss += (rows.share * term).sum()
            averages["diffusion"] = (rows.share * error).sum(), rows.share.sum()
        if logits is not None:
            entropy, correct, labelled = self._class_term(logits, rows)
            share = jnp.concatenate([rows.class_share] * len(self.classified))
            loss += (share * entropy).sum()  # (9)
            averages["cross_entropy"] = entropy.sum(), labelled.sum()
            averages["accuracy"] = correct.sum(), labelled.sum()
        return loss, (batch_stats, averages, term)

    def _network(self, weights, rows, key):
        """(raw output at (xt, t), logits of the halves that are classified, the next batch_stats).

        One encoder pass over what the terms need, the noised half first; None for what they do not.
        """

        def apply(method, *args, **options):
            return self.model.apply(
                weights, *args, train=True, method=method, rngs={"dropout": key}, **options
            )

        halves = {"noised": (rows.xt, rows.t), "own": rows.own and (rows.own.x, rows.own.t)}
        names = [name for name in halves if name in self.decoded | self.classified]
        x, t = (jnp.concatenate(both) for both in zip(*map(halves.get, names), strict=True))
        features, raw, logits = apply("encode", x, t), None, None

        def of(asked):
            """The features and times of these halves."""
            if asked == set(names):
                return features, t
            start = names.index(*asked) * len(rows.t)
            return jax.tree.map(lambda z: z[start : start + len(rows.t)], (features, t))

        if self.decoded:
            raw = apply("decode", *of(self.decoded))
        batch_stats = weights["batch_stats"]
        if self.classified:
            logits, updated = apply("classify", *of(self.classified), mutable=["batch_stats"])
            batch_stats = updated["batch_stats"]
        return raw, logits, batch_stats

    def _class_term(self, logits, rows):
        """((11), correct, labelled) of each row that is classified."""
        entropies = ENTROPIES[self.model.multi_label]
        # The classifier's own images are the last half; those of the noised one are never mixed.
        others = len(self.classified) - 1
        found = entropies(logits, jnp.concatenate([rows.label] * (others + 1)))
        if rows.own is None or rows.own.mixed is None:
            return found
        partners = jnp.concatenate([rows.label] * others + [rows.own.partner])
        mixed = jnp.concatenate([jnp.zeros_like(rows.own.mixed)] * others + [rows.own.mixed])
        return tuple(
            _mix(one, other, mixed)
            for one, other in zip(found, entropies(logits, partners), strict=True)
        )

    def _diffusion_term(self, raw, rows):
        """(each row's (10) with (12), or (10b), each row's plain squared error)."""
        x0, xt, t = rows.x0, rows.xt, rows.t
        prediction, variance = self.diffusion.split(raw)
        target = self.diffusion.target(x0, t, rows.eps)
        error = ((target - prediction) ** 2).mean(axis=(1, 2, 3))
        if self.kind in BOUND_FACTORS:
            bound = self.diffusion.bound(self.diffusion.estimate(raw, xt, t), x0, xt, t)
            return BOUND_FACTORS[self.kind](self.diffusion.steps) * bound, error
        term = self.diffusion.loss_weight(t, self.min_snr_gamma) * error
        if variance is not None:
            estimate = self.diffusion.estimate(raw, xt, t)
            estimate = estimate._replace(eps=jax.lax.stop_gradient(estimate.eps))
            bound = self.diffusion.bound(estimate, x0, xt, t)
            term += self.variance_weight * self.diffusion.steps * bound
        return term, error


def _mix(one: Array, other: Array, share: Array) -> Array:
    """Of two numbers of each row, the second for its share (15)."""
    return (1 - share) * one + share * other
