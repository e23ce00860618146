"""The joint loss: how well the noise is seen, plus how well the class is.

Owns what the network is asked at each step. Does not know optimisers.

(9)   L = L_diffusion + lambda · L_class                             Deja et al. 2023, section 3
(10)  L_diffusion = mean over batch, H, W, C of w(t) (target - prediction)²
(11)  L_class = sum over labelled inputs of CE(y, p(y | Z)) / their number; the inputs are the clean
      images at t = 0, the noised ones at their own t, or both; Z is the encoder's representations;
      clean images are augmented as the policy says (jdm.training.augment), and a mixed one has two
      labels, each with its share
(12)  learned variance adds b · T · bound(t), which trains the variance alone: the estimate of the
      noise is held fixed inside it                                  Nichol & Dhariwal 2021, eq. 16
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jdm.diffusion.process import Diffusion, pick, pixels_to_float
from jdm.nn.model import JointModel
from jdm.training.augment import POLICIES, Pairs, augment

# Which halves of the encoder's batch [noised; clean] the classifier is trained on.
CLASSIFY = ("clean", "noised", "both")

# One number of one step, to be summed over steps before it is divided: (sum, count).
Average = tuple[Float[Array, ""], Float[Array, ""]]


def masked_cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], shares: Float[Array, " b"] | float = 1.0
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(summed cross-entropy in nats, correct, labelled) over the rows whose label is not -1.

    shares: what each row counts for.
    """
    labelled = labels >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    correct = labelled & (logits.argmax(axis=-1) == labels)
    entropy = jnp.where(labelled, entropy, 0)
    return (shares * entropy).sum(), (shares * correct).sum(), (shares * labelled).sum()


def with_partners(
    logits: Float[Array, "n k"], labels: Int[Array, " n"], pairs: Pairs
) -> tuple[Float[Array, "m k"], Int[Array, " m"], Float[Array, " m"]]:
    """(logits, labels, shares) with a row more for the label of each partner, m = n + b.

    pairs: of the last b of the n rows, which are the mixed images; Zhang et al. 2018, equation (15)
    of jdm.training.augment.
    """
    b = len(pairs.share)
    shares = jnp.ones(len(logits)).at[-b:].subtract(pairs.share)
    return (
        jnp.concatenate([logits, logits[-b:]]),
        jnp.concatenate([labels, labels[-b:][pairs.partner]]),
        jnp.concatenate([shares, pairs.share]),
    )


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """The joint loss of a model under a diffusion.

    weight: lambda of (9). classify: which inputs the classifier is trained on, one of CLASSIFY.
    augment: what is done to the clean ones, one of POLICIES. min_snr_gamma: gamma of the min-SNR
    weights of (10), 0 for uniform weights. variance_weight: b of (12), used where the variance is
    learned.

    Raises ValueError, naming the config key, for an unknown name, and for a policy that needs clean
    images where the classifier has none.
    """

    model: JointModel
    diffusion: Diffusion
    weight: float
    classify: str
    augment: str
    min_snr_gamma: float
    variance_weight: float

    def __post_init__(self):
        pick("loss.classify", self.classify, CLASSIFY)
        policy = POLICIES[pick("loss.augment", self.augment, POLICIES)]
        if self.classify == "noised" and not policy.noised:
            raise ValueError(
                f"loss.augment={self.augment!r} is for clean images, which "
                "loss.classify='noised' leaves out; take loss.classify='clean' or 'both', or "
                "loss.augment='none'"
            )

    def __call__(
        self, params, batch: dict[str, Array], keys: dict[str, Key[Array, ""]]
    ) -> tuple[Float[Array, ""], dict[str, Average]]:
        """(L, averages) of a batch {image: uint8 [B, H, W, C], label: int32 [B]}, -1 = unlabelled.

        keys: the streams t, noise, dropout and, under a policy, augment. The averages are pairs
        (sum, count).
        """
        x0 = pixels_to_float(batch["image"])
        t = jax.random.randint(keys["t"], x0.shape[:1], 0, self.diffusion.steps)
        eps = jax.random.normal(keys["noise"], x0.shape)
        xt = self.diffusion.q_sample(x0, t, eps)

        own, pairs = self._augmented(x0, xt, keys)
        raw, logits, labels = self._network(params, own, xt, t, batch["label"], keys["dropout"])
        shares = 1.0
        if pairs is not None:
            logits, labels, shares = with_partners(logits, labels, pairs)

        diffusion, error = self._diffusion_term(raw, x0, xt, t, eps)
        entropy, correct, labelled = masked_cross_entropy(logits, labels, shares)
        loss = diffusion + self.weight * entropy / jnp.maximum(labelled, 1)  # (9)
        one = jnp.ones(())
        return loss, {
            "loss": (loss, one),
            "diffusion": (error, one),
            "cross_entropy": (entropy, labelled),
            "accuracy": (correct, labelled),
        }

    def _augmented(self, x0, xt, keys):
        """(what the encoder sees beside xt, for the classifier alone; its pairs, see `augment`)."""
        if self.augment == "none":
            return x0, None
        own = xt if self.classify == "noised" else x0
        return augment(POLICIES[self.augment], keys["augment"], own)

    def _network(self, params, own, xt, t, labels, key):
        """(raw output at (xt, t), logits, their labels), from one encoder pass over both inputs."""

        def apply(method, *args):
            return self.model.apply(
                {"params": params}, *args, train=True, method=method, rngs={"dropout": key}
            )

        if self.classify == "noised" and self.augment == "none":
            features = apply("encode", xt, t)
            return apply("decode", features, t), apply("classify", features, t), labels
        own_t = t if self.classify == "noised" else jnp.zeros_like(t)
        times = jnp.concatenate([t, own_t])
        features = apply("encode", jnp.concatenate([xt, own]), times)
        first = jax.tree.map(lambda z: z[: len(t)], features)
        second = jax.tree.map(lambda z: z[len(t) :], features)
        raw = apply("decode", first, t)
        if self.classify != "both":
            return raw, apply("classify", second, own_t), labels
        return raw, apply("classify", features, times), jnp.concatenate([labels, labels])

    def _diffusion_term(self, raw, x0, xt, t, eps):
        """((10) with (12), the plain mean squared error)."""
        prediction, variance = self.diffusion.split(raw)
        error = ((self.diffusion.target(x0, t, eps) - prediction) ** 2).mean(axis=(1, 2, 3))
        term = (self.diffusion.loss_weight(t, self.min_snr_gamma) * error).mean()
        if variance is not None:
            estimate = self.diffusion.estimate(raw, xt, t)
            estimate = estimate._replace(eps=jax.lax.stop_gradient(estimate.eps))
            bound = self.diffusion.bound(estimate, x0, xt, t).mean()
            term += self.variance_weight * self.diffusion.steps * bound
        return term, error.mean()
