"""(14a): guidance by the features Z, which the decoder and the classifier share.

After Deja et al. 2023, section 4, whose own update is (14c). eps(Z) is the noise estimate decoded
from Z, and r the step size of the perturbation (process.Prediction). Norms are taken per image.

(14a)  eps + s sqrt(1 - abar_t) |g| d / |d|,   d = ± [eps(Z + r |Z| dZ / |dZ|) - eps(Z)]

1. Perturb Z along dZ, the gradient of the classifier, by |r| times the norm of Z. This may take
   several inner steps of equal length, each along the gradient where the previous one ended.
2. Decode Z and the perturbed Z; d is the difference of the two noise estimates.
3. Choose the sign of d, for each image, so that the estimate of x_0 moves along g.
4. Rescale d to the norm of g. The step is then as long as that of pixel guidance (14), so that one
   scale suits every network and every t, which it does not in (14c).

The sign of r depends on the prediction, because the decoder knows x_t only through Z. To it, a Z
that was moved along dZ looks like the Z of an input x_t + u, where u points toward the target. A
network that predicts x_0 then estimates an image closer to the target. A network that predicts eps
takes u for noise and removes it, which leads away from the target; its r is negative. For v it
depends on t which of the two happens; step 3 finds the right sign in every case.
"""

import jax
import jax.numpy as jnp

from jdm.arrays import Images, Times
from jdm.diffusion.guidance import base
from jdm.diffusion.guidance.base import LABELLED, Guidance, norm, per_row, select
from jdm.diffusion.process import PREDICTIONS


def representation(network, diffusion, method, targets, scale_fn, pixel_share: float = 0.0):
    """The weighted mean of (14), with the weight pixel_share, and (14a)."""
    r = PREDICTIONS[diffusion.prediction].perturbation
    mask = base.block_mask(network.block_names, method.blocks)

    def eps_fn(x: Images, t: Times):
        g, dz, features = base.gradients(network, x, t, targets)
        length = r / method.inner_steps * norm(select(features, mask))

        def move(perturbations, dz):
            """Adds one step of the length along dz, for the selected blocks."""
            dz = select(dz, mask)
            p = length / jnp.maximum(norm(dz), base.TINY)
            return jax.tree.map(lambda q, dz: q + per_row(p, dz) * dz, perturbations, dz)

        def next_step(_, perturbations):
            _, dz, _ = base.gradients(network, x, t, targets, perturbations)
            return move(perturbations, dz)

        perturbations = move(jax.tree.map(jnp.zeros_like, features), dz)
        if method.inner_steps > 1:
            perturbations = jax.lax.fori_loop(1, method.inner_steps, next_step, perturbations)
        # Each feature moves by its own perturbation only: the encoder does not run again.
        perturbed = jax.tree.map(jnp.add, features, perturbations)
        estimate = network.decode(features, x, t)
        d = network.decode(perturbed, x, t).eps - estimate.eps
        # x_0 = (x_t - b eps) / a: the estimate of x_0 moves along g if eps moves against it.
        sign = jnp.where(per_row((d * g).sum(axis=(1, 2, 3)), x) < 0, 1, -1)
        change = sign * d * per_row(norm(g) / jnp.maximum(norm(d), base.TINY), x)
        change = (1 - pixel_share) * change - pixel_share * g
        _, b = diffusion.scales(t)
        return estimate._replace(eps=estimate.eps + scale_fn(t) * b * change)

    return eps_fn


GUIDANCE = Guidance(representation, default_scale=8.0, takes=(*LABELLED, "blocks", "inner_steps"))
