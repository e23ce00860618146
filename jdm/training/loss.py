"""The joint loss: how well the noise is seen, plus how well the class is.

Owns what the network is asked at each step. Does not know optimisers.

(9)   L = L_diffusion + lambda · L_class                             Deja et al. 2023, section 3
(10)  L_diffusion = mean over batch, H, W, C of w(t) (target - prediction)²
(11)  L_class = sum over labelled inputs of CE(y, p(y | Z)) / their number; the inputs are the clean
      images at t = 0, the noised ones at their own t, or both; Z is the encoder's representations
(12)  learned variance adds b · T · bound(t), which trains the variance alone: the estimate of the
      noise is held fixed inside it                                  Nichol & Dhariwal 2021, eq. 16
(10b) the variational bound itself in place of (10): L_diffusion = mean of bound(t) for "kl", of
      T · bound(t), an estimate of the whole chain's, for "rescaled_kl"; in bits per dimension
                                                                     Ho et al. 2020, eq. 5
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jdm.diffusion.process import MIN_SNR_WEIGHTS, Diffusion, pick, pixels_to_float
from jdm.nn.model import JointModel

# Which halves of the encoder's batch [noised; clean] the classifier is trained on.
CLASSIFY = ("clean", "noised", "both")

# What L_diffusion is: the squared error (10), or (10b) with its factor of the bound: T -> factor.
BOUND_FACTORS = {"kl": lambda steps: 1, "rescaled_kl": lambda steps: steps}
KINDS = ("mse", *BOUND_FACTORS)

# One number of one step, to be summed over steps before it is divided: (sum, count).
Average = tuple[Float[Array, ""], Float[Array, ""]]


def masked_cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(summed cross-entropy in nats, correct, labelled) over the rows whose label is not -1."""
    labelled = labels >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    correct = labelled & (logits.argmax(axis=-1) == labels)
    return jnp.where(labelled, entropy, 0).sum(), correct.sum() * 1.0, labelled.sum() * 1.0


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """The joint loss of a model under a diffusion.

    kind: of the diffusion term, one of KINDS. weight: lambda of (9). classify: which inputs the
    classifier is trained on, one of CLASSIFY. min_snr_gamma: gamma of the min-SNR weights of (10),
    0 for uniform weights. variance_weight: b of (12), used where the variance is learned and the
    kind is "mse"; the bound trains mean and variance alike.

    Raises ValueError for an unknown name, and for min-SNR weights where (6) has none.
    """

    model: JointModel
    diffusion: Diffusion
    kind: str
    weight: float
    classify: str
    min_snr_gamma: float
    variance_weight: float

    def __post_init__(self):
        pick("loss.kind", self.kind, KINDS)
        pick("loss.classify", self.classify, CLASSIFY)
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

    def __call__(
        self, params, batch: dict[str, Array], keys: dict[str, Key[Array, ""]]
    ) -> tuple[Float[Array, ""], dict[str, Average]]:
        """(L, averages) of a batch {image: uint8 [B, H, W, C], label: int32 [B]}, -1 = unlabelled.

        keys: the streams t, noise and dropout. The averages are pairs (sum, count).
        """
        x0 = pixels_to_float(batch["image"])
        t = jax.random.randint(keys["t"], x0.shape[:1], 0, self.diffusion.steps)
        eps = jax.random.normal(keys["noise"], x0.shape)
        xt = self.diffusion.q_sample(x0, t, eps)

        raw, logits, labels = self._network(params, x0, xt, t, batch["label"], keys["dropout"])

        diffusion, error = self._diffusion_term(raw, x0, xt, t, eps)
        entropy, correct, labelled = masked_cross_entropy(logits, labels)
        loss = diffusion + self.weight * entropy / jnp.maximum(labelled, 1)  # (9)
        one = jnp.ones(())
        return loss, {
            "loss": (loss, one),
            "diffusion": (error, one),
            "cross_entropy": (entropy, labelled),
            "accuracy": (correct, labelled),
        }

    def _network(self, params, x0, xt, t, labels, key):
        """(raw output at (xt, t), logits, their labels), from one encoder pass over both inputs."""

        def apply(method, *args):
            return self.model.apply(
                {"params": params}, *args, train=True, method=method, rngs={"dropout": key}
            )

        if self.classify == "noised":
            features = apply("encode", xt, t)
            return apply("decode", features, t), apply("classify", features, t), labels
        times = jnp.concatenate([t, jnp.zeros_like(t)])
        features = apply("encode", jnp.concatenate([xt, x0]), times)
        noised = jax.tree.map(lambda z: z[: len(t)], features)
        clean = jax.tree.map(lambda z: z[len(t) :], features)
        raw = apply("decode", noised, t)
        if self.classify == "clean":
            return raw, apply("classify", clean, times[len(t) :]), labels
        return raw, apply("classify", features, times), jnp.concatenate([labels, labels])

    def _diffusion_term(self, raw, x0, xt, t, eps):
        """((10) with (12), or (10b), the plain mean squared error)."""
        prediction, variance = self.diffusion.split(raw)
        error = ((self.diffusion.target(x0, t, eps) - prediction) ** 2).mean(axis=(1, 2, 3))
        if self.kind in BOUND_FACTORS:
            bound = self.diffusion.bound(self.diffusion.estimate(raw, xt, t), x0, xt, t).mean()
            return BOUND_FACTORS[self.kind](self.diffusion.steps) * bound, error.mean()
        term = (self.diffusion.loss_weight(t, self.min_snr_gamma) * error).mean()
        if variance is not None:
            estimate = self.diffusion.estimate(raw, xt, t)
            estimate = estimate._replace(eps=jax.lax.stop_gradient(estimate.eps))
            bound = self.diffusion.bound(estimate, x0, xt, t).mean()
            term += self.variance_weight * self.diffusion.steps * bound
        return term, error.mean()
