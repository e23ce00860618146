"""The joint loss: the diffusion term and the classifier's, from one pass of the shared encoder.

(9)    L = L_diffusion + lambda · L_class                         Deja et al. 2023, section 3
(10)   L_diffusion: the squared error of the prediction           terms/diffusion.py
(10b)  the variational bound in place of (10)                     terms/diffusion.py
(10c)  importance weights for (10), if t is not drawn uniformly   t_sampler.py
(11)   L_class: the cross-entropy of the classifier               terms/classifier.py
(12)   the bound that (10) includes if the variance is learned    terms/diffusion.py

This file prepares the inputs of the encoder and adds up the terms. A term has a value and a share
for each row (image) of a batch, and L is the sum over terms and rows of share · value. What depends
on the whole batch is in the share: for (11), lambda / number of labels. So the losses of the parts
of a batch add up to its loss, wherever its labels are (except under batch normalisation).
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from jdm.arrays import Times
from jdm.config import OPTIONS
from jdm.diffusion.process import Diffusion, pixels_to_float
from jdm.nn.model import JointModel
from jdm.training.augment import POLICIES, augment, partners
from jdm.training.terms import TERMS
from jdm.training.terms.base import Batch, Input, Keys, Metrics, Outputs, PerRow, Rows, Term


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """The joint loss of a model under a diffusion.

    settings: the section config.loss; jdm.configs.base describes its keys. Raises InvalidValue,
    naming the key, for a setting that is not allowed or contradicts another.
    """

    model: JointModel
    diffusion: Diffusion
    settings: ConfigDict

    def __post_init__(self):
        for key, value in self.settings.items():
            OPTIONS[f"loss.{key}"].check(f"config.loss.{key}", value)
        for term in TERMS.values():
            term.check(self)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that are computed, by name."""
        return {name: TERMS[name] for name in self.settings.terms}

    @property
    def decoded(self) -> set[str]:
        """The names of the inputs that the decoder reads."""
        return {name for term in self.terms.values() for name in term.decodes(self)}

    @property
    def classified(self) -> set[str]:
        """The names of the inputs that the classifier reads."""
        return {name for term in self.terms.values() for name in term.classifies(self)}

    def rows(
        self, batch: Batch, t: Times, importance: PerRow, keys: Keys, step: Int[Array, ""]
    ) -> Rows:
        """Draws the noise and the augmentation of a whole batch, and computes the shares.

        t: the noise level of each noised image, int32 [B] in [0, T). importance: the weights (10c),
        float32 [B]. keys: for the streams "noise" and "augment". step: number of steps done before.
        """
        x0, label = pixels_to_float(batch["image"]), batch["label"]
        eps = jax.random.normal(keys["noise"], x0.shape, jnp.float32)
        xt = self.diffusion.q_sample(x0, t, eps)
        make = {  # in the order in which the encoder sees them
            "noised": lambda: Input(xt, t, label),
            "clean": lambda: self._augmented(Input(x0, jnp.zeros_like(t), label), keys["augment"]),
            "augmented_noised": lambda: self._augmented(Input(xt, t, label), keys["augment"]),
        }
        needed = self.decoded | self.classified
        inputs = OrderedDict((name, make[name]()) for name in make if name in needed)
        terms = self.terms.items()
        shares = {name: term.shares(self, inputs, importance, step) for name, term in terms}
        return Rows(x0, eps, inputs, shares)

    def _augmented(self, plain: Input, key: Key[Array, ""]) -> Input:
        """The input under the policy config.loss.augment, which may mix images and labels."""
        x, shares = augment(POLICIES[self.settings.augment], key, plain.x)
        if shares is None:
            return plain._replace(x=x)
        return Input(x, plain.t, plain.label, partners(plain.label), shares)

    def __call__(
        self, params, batch_stats, rows: Rows, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Metrics, dict[str, PerRow]]]:
        """(loss, (the next batch_stats, metrics, {term: the value of each row [B]})).

        The loss is the sum over these rows, a whole batch or a part of it. key: for dropout.
        """
        weights, rngs = {"params": params, "batch_stats": batch_stats}, {"dropout": key}

        def apply(method: str, args: dict[str, tuple]) -> dict[str, Any]:
            """{input: result}: one call for all inputs, because a head may normalise over rows."""
            if not args:
                return {}
            joined = jax.tree.map(lambda *x: _in_turn(x), *args.values())
            found, updated = self.model.apply(
                weights, *joined, train=True, method=method, rngs=rngs, mutable=["batch_stats"]
            )
            weights.update(updated)
            leaves, structure = jax.tree.flatten(found)
            parts = zip(*(_separated(leaf, len(args)) for leaf in leaves), strict=True)
            return dict(zip(args, (jax.tree.unflatten(structure, p) for p in parts), strict=True))

        inputs = rows.inputs
        features = apply("encode", {name: given[:2] for name, given in inputs.items()})
        encoded = {name: (features[name], inputs[name].t) for name in inputs}
        raw = apply("decode", {k: encoded[k] for k in inputs if k in self.decoded})
        logits = apply("classify", {k: encoded[k] for k in inputs if k in self.classified})
        outputs = {name: Outputs(raw.get(name), logits.get(name)) for name in inputs}

        loss, values = jnp.zeros((), jnp.float32), {}
        metrics: Metrics = {}
        for name, term in self.terms.items():
            values[name], logged = term.values(self, rows, outputs)
            loss += (rows.shares[name] * values[name]).sum()  # (9)
            metrics |= logged
        return loss, (weights["batch_stats"], metrics, values)


def _in_turn(inputs: Sequence[Array]) -> Array:
    """The rows of n arrays [B, ...] as one [n · B, ...]: row 0 of each, row 1 of each, and so on.

    So each device, which has some of the rows of every array, has the same rows of the result:
    one array after the other would move half of all representations between devices.
    """
    return jnp.stack(inputs, axis=1).reshape(-1, *inputs[0].shape[1:])


def _separated(rows: Array, n: int) -> list[Array]:
    """The n arrays of which `_in_turn` made rows."""
    return [rows.reshape(-1, n, *rows.shape[1:])[:, i] for i in range(n)]
