"""Likelihood: the variational bound on -log p(x_0), in bits per dimension.

    bound = L_T + sum_{t < T} L_t                                    Ho et al. 2020, eq. 5

The noise levels are divided into S strata, which are narrow near t = 0, where the terms are large
and change fast. In each stratum every image draws one t, whose term counts as often as the stratum
has levels. So the estimate has the exact bound as its mean; with S = T it has all the terms.

The estimate of x_0 is clipped to [-1, 1], as by default in sampling (Ho et al. 2020, section 3.2).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from jdm.analysis.evaluators.base import Curve, EvaluationOptions, Value
from jdm.analysis.logits import image_keys
from jdm.analysis.shares import in_shares
from jdm.data.splits import Split
from jdm.diffusion.process import Estimate, pixels_to_float
from jdm.diffusion.samplers import image_noise
from jdm.errors import InvalidValue
from jdm.joint import Joint, check_trained, make_network
from jdm.mesh import in_batches
from jdm.numerics import fixed_flags
from jdm.options import POSITIVE, WHOLE, Option
from jdm.tracking import Progress

STEPS = Option(None, "noise levels at which each image's bound is computed", POSITIVE, kind=WHOLE)


class Bound(NamedTuple):
    """The bound of N images, in bits per dimension.

    prior: L_T of each image. terms: of each image, the term at one t in each of S strata. edges:
    stratum k holds the noise levels edges[k] to edges[k + 1] - 1.
    """

    prior: Float[np.ndarray, " n"]
    terms: Float[np.ndarray, "n s"]
    edges: Int[np.ndarray, " edges"]

    @property
    def per_image(self) -> Float[np.ndarray, " n"]:
        """The bound of each image, or its estimate, float64 [N]."""
        return self.prior + self.terms @ np.diff(self.edges)


def strata(levels: int, steps: int | None) -> Int[np.ndarray, " edges"]:
    """The edges, int32 [S + 1], of S = steps strata of the noise levels 0 to T - 1.

    Their widths grow from 1 on with the square of k, since the terms fall about as 1 / t or faster.
    steps: None, or T and more, gives each level its own stratum.
    """
    count = min(steps or levels, levels)
    k = np.arange(count + 1)
    return np.maximum(k, np.round(levels * (k / count) ** 3)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bound(model, diffusion, weights: Any, images, seed, index, edges):
    """(prior [B], terms [S, B]), see Bound."""
    x0, network = pixels_to_float(images), make_network(model, diffusion, weights)
    keys = image_keys(seed, index)

    def term(stratum):
        low, high = stratum
        # Indices below T are of noise, and those above of t: the exact bound and an estimate of it
        # have the same noise where they have the same t.
        of_t = jax.vmap(jax.random.fold_in, (0, None))(keys, diffusion.steps + 1 + low)
        t = jax.vmap(lambda key: jax.random.randint(key, (), low, high, jnp.int32))(of_t)
        xt = diffusion.q_sample(x0, t, image_noise(keys, low, x0.shape[1:]))
        estimate = network.decode(network.encode(xt, t), xt, t)
        clipped = jnp.clip(diffusion.x0_of(estimate, xt, t), -1, 1)
        eps = diffusion.eps_from_x0(xt, t, clipped)
        estimate = Estimate(eps, estimate.log_variance, own=(eps, clipped))
        return diffusion.bound(estimate, x0, xt, t)

    return diffusion.prior_bound(x0), jax.lax.map(term, (edges[:-1], edges[1:]))


@fixed_flags()
def image_bounds(
    joint: Joint,
    images: UInt8[np.ndarray, "n h w c"],
    steps: int | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
    shared: bool = False,
) -> Bound:
    """The variational bound of each image; `.per_image` is [N], in bits per dimension.

    steps: at how many noise levels it is computed, which is the number of forward passes; None, or
    T and more, is at all T. seed: in [0, 2**32). The noise and the drawn levels of an image depend
    on the seed and its index alone. batch_size: images in one forward pass; it does not change the
    result. shared: see `shares.in_shares`.

    Raises InvalidValue for steps < 1, and where the model was not trained to generate.
    """
    check_trained(joint, "diffusion")
    STEPS.check("bound_steps", steps)
    edges = strata(joint.diffusion.steps, steps)
    model, diffusion = joint.model, joint.diffusion

    def of_batch(weights: Any, batch: Any, index: Any) -> Any:
        prior, terms = _bound(model, diffusion, weights, batch, jnp.uint32(seed), index, edges)
        return prior, terms.T

    def bounds(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(rows.start, rows.stop, dtype=np.int32)
        with Progress(len(index), "computing the bound", "images") as progress:
            arrays = [images[rows], index]
            return in_batches(of_batch, joint.weights, arrays, batch_size, progress.advance)

    prior, terms = in_shares(bounds, len(images), shared)
    # In float64, since hundreds of terms are added.
    return Bound(prior.astype(np.float64), terms.astype(np.float64), edges)


def likelihood(
    joint: Joint, split: Split, options: EvaluationOptions
) -> Iterator[tuple[str, Value]]:
    """The mean bound over the images, exact or estimated at options.bound_steps noise levels.

    Yields "bits_per_dimension", and "bits_per_dimension_error", its standard error: the standard
    deviation of the bound over the images, divided by sqrt(N). It covers which images were measured
    and, in an estimate, which t were drawn. A single image has none. "bits_per_dimension_prior" is
    L_T, and the curve "bound_by_t" the mean term at each t, or in each stratum at its middle.

    Raises InvalidValue for a split without images, for a wrong options.bound_steps, and where the
    model was not trained to generate.
    """
    if not len(split.images):
        raise InvalidValue("split", split.name, "has no image")
    check_trained(joint, "diffusion")
    STEPS.check("bound_steps", options.bound_steps)
    return _values(joint, split, options)


def _values(joint: Joint, split: Split, options: EvaluationOptions) -> Iterator[tuple[str, Value]]:
    settings: dict[str, Any] = dict(seed=options.seed, batch_size=options.batch_size)
    settings["shared"] = options.shared
    found = image_bounds(joint, split.images, options.bound_steps, **settings)
    bits, edges = found.per_image, found.edges
    yield "bits_per_dimension", float(bits.mean())
    if len(bits) > 1:
        yield "bits_per_dimension_error", float(bits.std(ddof=1) / np.sqrt(len(bits)))
    yield "bits_per_dimension_prior", float(found.prior.mean())
    middles, terms = (edges[:-1] + edges[1:] - 1) / 2, found.terms.mean(axis=0)
    lines = {"term of the bound": terms.tolist()}
    yield "bound_by_t", Curve("t", "bits per dimension", middles.tolist(), lines)


EVALUATOR = likelihood
