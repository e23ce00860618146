"""Guidance: steers sampling toward a target, along the gradient of a classifier.

A guidance turns a joint network into the eps_fn(x, t) that a sampler calls. It sees the network
only as the functions of `Network`, and a sampler sees only the eps_fn, so that any guidance works
with any sampler. Each guidance is one file.

The target of an image is a row of weights q, one for each of the M outcomes whose probability the
classifier estimates. With K classes, the outcomes are the classes (M = K), and q is one-hot or a
distribution over them. With K labels that are on or off, the outcomes are each label on, then each
label off (M = 2 K), and q is 1 for the outcomes that are wanted. A row of zeros leaves its image
unguided. Guidance increases

(13)  log p(target | x_t) = sum_k q_k log p(outcome k | x_t)

Let s be the scale, g the gradient of (13) with respect to x_t, and Z the features: the hidden
representations that the decoder and the classifier share. dZ is the total derivative of (13) with
respect to Z: it includes the effect of each feature on the later ones that are computed from it. N
is the number of an image's values.

(14)  pixel            eps - s sqrt(1 - abar_t) g
(14a) representation   the eps of an estimate of x_0 from Z + P and x_t + u, where
                       u = s sqrt(N) g and P = (u · g) dZ / mean_i |dz_i|²
(14c) published        the eps that is decoded from Z - s dZ

Under the first two, a positive scale moves the image toward the target; under (14a) only up to a
length, beyond which the network's answer to a larger P is another. Under (14c), which is there for
comparison, the direction and the distance depend on the network.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdm import names
from jdm.arrays import Times
from jdm.diffusion.guidance.base import Guidance, Network, Targets
from jdm.diffusion.guidance.base import block_mask as block_mask
from jdm.diffusion.guidance.base import gradients as gradients
from jdm.diffusion.guidance.base import log_probabilities_of as log_probabilities_of
from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, PerImage
from jdm.diffusion.samplers.base import EpsFn

GUIDANCE: dict[str, Guidance] = names.GUIDANCE.modules(__name__, "GUIDANCE")

# The factor of the scale, as a function of u = t / (T - 1): u is 1 at the noisiest timestep, 0 at
# the least noisy one. The mean of each factor over u is 1.
SCALE_SCHEDULES: dict[str, Callable[[Array], Array]] = names.SCALE_SCHEDULES.records(
    constant=jnp.ones_like,
    early=lambda u: 2 * u,
    late=lambda u: 2 * (1 - u),
    middle=lambda u: 2 * jnp.sin(np.pi * u) ** 2,
)


def default_guidance(labelled: bool, classifier: bool = False) -> str:
    """The guidance where none is named. labelled: whether there are labels. classifier: whether
    another model's classifier is to guide."""
    if not labelled:
        return "none"
    return "pixel" if classifier else "representation"  # docs/results.md compares the two


def chosen(method: Method, labelled: bool, classifier: bool = False) -> Method:
    """The method with a choice for everything that it leaves open, except the scale. See
    `default_guidance`."""
    name = method.guidance or default_guidance(labelled, classifier)
    unset = [field for field in ("sampler", "steps", "threshold") if getattr(method, field) is None]
    values = {field: getattr(GUIDANCE[name], field) for field in unset}
    return dataclasses.replace(method, guidance=name, **values)


def guide(
    network: Network,
    diffusion: Diffusion,
    method: Method,
    targets: Targets | None,
    scale: float | Float[Array, ""],
) -> EpsFn:
    """The guided eps_fn of the network.

    method: its guidance, scale_schedule and blocks are used. targets: q of (13),
    [B, M]; None only for a guidance that needs no labels. scale: s. method.scale is not read; this
    one may be traced, so that one compiled program serves every scale.

    Raises InvalidValue for blocks that the network does not have.
    """
    factor = SCALE_SCHEDULES[method.scale_schedule]

    def scale_fn(t: Times) -> PerImage:
        u = t.astype(jnp.float32) / max(diffusion.steps - 1, 1)
        return scale * factor(u)[:, None, None, None]

    return GUIDANCE[method.guidance].make(network, diffusion, method, targets, scale_fn)
