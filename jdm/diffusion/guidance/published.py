"""The published update of the features: Deja et al. 2023, as their code implements it.

(14c)  eps decoded from Z - s dZ

The scale multiplies dZ itself, so that an image moves further where the classifier's gradient is
larger. A learned variance is decoded from the moved Z too. The published sampler does not clip
estimates of x_0.
"""

import jax

from jdm.arrays import Images, Times
from jdm.diffusion.guidance.base import LABELLED, Guidance, block_mask, gradients, per_row, select


def published(network, diffusion, method, targets, scale_fn):
    mask = block_mask(network.block_names, method.blocks)

    def eps_fn(x: Images, t: Times):
        _, dz, features = gradients(network, x, t, targets)
        s = scale_fn(t)[:, 0, 0, 0]
        moved = jax.tree.map(lambda z, dz: z - per_row(s, z) * dz, features, select(dz, mask))
        return network.decode(moved, x, t)

    return eps_fn


GUIDANCE = Guidance(published, default_scale=1000.0, takes=(*LABELLED, "blocks"), threshold="none")
