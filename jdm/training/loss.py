"""The joint loss: how well the noise is seen, plus how well the class is.

Owns what the network is asked at each step. Does not know optimisers.

(9)   L = L_diffusion + lambda · L_class                             Deja et al. 2023, section 3
(10)  L_diffusion = mean over batch, H, W, C of w(t) (target - prediction)²
(11)  L_class = sum over labelled inputs of CE(y, p(y | Z)) / their number; the inputs are the clean
      images at t = 0, the noised ones at their own t, or both; Z is the encoder's representations
(12)  learned variance adds b · T · bound(t), which trains the variance alone: the estimate of the
      noise is held fixed inside it                                  Nichol & Dhariwal 2021, eq. 16
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jdm.diffusion.process import Diffusion, pick, pixels_to_float
from jdm.nn.model import JointModel

# Which halves of the encoder's batch [noised; clean] the classifier is trained on.
CLASSIFY = ("clean", "noised", "both")

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

    weight: lambda of (9). classify: which inputs the classifier is trained on, one of CLASSIFY.
    min_snr_gamma: gamma of the min-SNR weights of (10), 0 for uniform weights. variance_weight: b
    of (12), used where the variance is learned.
    """

    model: JointModel
    diffusion: Diffusion
    weight: float
    classify: str
    min_snr_gamma: float
    variance_weight: float

    def __post_init__(self):
        pick("loss.classify", self.classify, CLASSIFY)

    def __call__(
        self, params, batch_stats, batch: dict[str, Array], keys: dict[str, Key[Array, ""]]
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Average]]]:
        """(L, (batch_stats, averages)) of a batch {image: uint8 [B, H, W, C], label: int32 [B]}.

        A label of -1 is none. keys: the streams t, noise and dropout. batch_stats: the head's, as
        they were and as they are after this batch. The averages are pairs (sum, count).
        """
        x0 = pixels_to_float(batch["image"])
        t = jax.random.randint(keys["t"], x0.shape[:1], 0, self.diffusion.steps)
        eps = jax.random.normal(keys["noise"], x0.shape)
        xt = self.diffusion.q_sample(x0, t, eps)

        weights = {"params": params, "batch_stats": batch_stats}
        raw, logits, labels, batch_stats = self._network(
            weights, x0, xt, t, batch["label"], keys["dropout"]
        )

        diffusion, error = self._diffusion_term(raw, x0, xt, t, eps)
        entropy, correct, labelled = masked_cross_entropy(logits, labels)
        loss = diffusion + self.weight * entropy / jnp.maximum(labelled, 1)  # (9)
        one = jnp.ones(())
        return loss, (
            batch_stats,
            {
                "loss": (loss, one),
                "diffusion": (error, one),
                "cross_entropy": (entropy, labelled),
                "accuracy": (correct, labelled),
            },
        )

    def _network(self, weights, x0, xt, t, labels, key):
        """(raw output at (xt, t), logits, their labels, the next batch_stats).

        The encoder passes once over all inputs.
        """

        def apply(method, *args, **options):
            return self.model.apply(
                weights, *args, train=True, method=method, rngs={"dropout": key}, **options
            )

        if self.classify == "noised":
            features, times = apply("encode", xt, t), t
            raw = apply("decode", features, t)
        else:
            times = jnp.concatenate([t, jnp.zeros_like(t)])
            features = apply("encode", jnp.concatenate([xt, x0]), times)
            noised = jax.tree.map(lambda z: z[: len(t)], features)
            clean = jax.tree.map(lambda z: z[len(t) :], features)
            raw = apply("decode", noised, t)
            if self.classify == "clean":
                features, times = clean, times[len(t) :]
            else:
                labels = jnp.concatenate([labels, labels])
        logits, updated = apply("classify", features, times, mutable=["batch_stats"])
        return raw, logits, labels, updated["batch_stats"]

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
