"""The diffusion term: the error of the network's prediction from noised images.

(10)   L_diffusion = mean over B, H, W, C of w(t) (target - prediction)²    Ho et al. 2020, eq. 14
(10b)  L_diffusion = mean over B of bound(t) ("kl"), a term of the variational bound (5) in bits per
       dimension, or of T · bound(t) ("rescaled_kl"), an estimate of the sum over all t
                                                                           Ho et al. 2020, eq. 5
(12)   variance_weight · T · bound(t) is added to (10) if the variance is learned. No gradient flows
       through its noise estimate: it trains the variance only     Nichol & Dhariwal 2021, eq. 16

The target is eps, x_0 or another quantity (config.diffusion.prediction). w(t) is 1, or a min-SNR
weight (6). The mean over the batch is weighted by the importance weights (10c).
"""

import jax

from jdm import names
from jdm.diffusion.process import PREDICTIONS, Estimate
from jdm.errors import InvalidValue
from jdm.training.terms.base import Metrics, PerRow, Rows, Term

INPUT = "noised"


def shares(loss, inputs, importance: PerRow, step) -> PerRow:
    """The importance weight of each row / B."""
    return importance / len(importance)


def values(loss, rows: Rows, outputs) -> tuple[PerRow, Metrics]:
    """(10) or (10b) of each row, by config.loss.kind. Logs the squared error without w(t)."""
    raw, (xt, t, *_) = outputs[INPUT].raw, rows.inputs[INPUT]
    prediction, _ = loss.diffusion.split(raw)
    target = loss.diffusion.target(rows.x0, t, rows.eps)
    error = ((target - prediction) ** 2).mean(axis=(1, 2, 3))
    value = KINDS[loss.settings.kind](loss, rows, error, loss.diffusion.estimate(raw, xt, t))
    share = rows.shares["diffusion"]
    return value, {"diffusion": ((share * error).sum(), share.sum())}


def mse(loss, rows: Rows, error: PerRow, estimate: Estimate) -> PerRow:
    """(10), with (12) if the variance is learned."""
    value = loss.diffusion.loss_weight(rows.inputs[INPUT].t, loss.settings.min_snr_gamma) * error
    if estimate.log_variance is not None:
        constant = jax.lax.stop_gradient(estimate)._replace(log_variance=estimate.log_variance)
        value += loss.settings.variance_weight * rescaled_kl(loss, rows, error, constant)
    return value


def kl(loss, rows: Rows, error: PerRow, estimate: Estimate) -> PerRow:
    """(10b): bound(t)."""
    return loss.diffusion.bound(estimate, rows.x0, *rows.inputs[INPUT][:2])


def rescaled_kl(loss, rows: Rows, error: PerRow, estimate: Estimate) -> PerRow:
    """(10b): T · bound(t)."""
    return loss.diffusion.steps * kl(loss, rows, error, estimate)


KINDS = names.LOSS_KINDS.records({"mse": mse, "kl": kl, "rescaled_kl": rescaled_kl})


def check(loss) -> None:
    """Raises InvalidValue for min-SNR weights of what has none: the bound, and some predictions."""
    settings, prediction = loss.settings, loss.diffusion.prediction
    gamma, kind = settings.min_snr_gamma, settings.kind
    if gamma and KINDS[kind] is not mse:
        allowed = f"weights squared errors, which config.loss.kind={kind!r} does not use"
        raise InvalidValue("config.loss.min_snr_gamma", gamma, allowed, "0 is needed")
    if gamma and PREDICTIONS[prediction].min_snr is None:
        allowed = f"does not go with config.diffusion.prediction={prediction!r}"
        hint = "0 is needed, or one of " + ", ".join(k for k, p in PREDICTIONS.items() if p.min_snr)
        raise InvalidValue("config.loss.min_snr_gamma", gamma, allowed, hint)


TERM = Term(shares, values, check, decodes=lambda loss: (INPUT,))
