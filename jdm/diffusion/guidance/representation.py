"""(14a): guidance by the features Z, which the decoder and the classifier share.

After Deja et al. 2023, section 4, whose own update is (14c). Let x_0(Z, x_t) be the image that is
estimated from Z and x_t. Every representation z_i is moved along its total derivative dz_i, as far
as corresponds to a shift u of x_t toward the target:

(14a)  x_0(Z + P, x_t + u),   u = s (1 - abar_t) g,   P_i = (u · g) dz_i / |dz_i|²

The sampler goes on from x_t, so it is returned as eps(Z + P, x_t + u) - u / sqrt(1 - abar_t).

Length: to first order, u increases log p(target) by u · g. P_i is the smallest change of z_i that
increases it by as much. Both keep their meaning at every t and for every network: a z_i in other
units moves by the same amount in these units.

Direction: Z + P stands for the Z of x_t + u, so that (14a) estimates x_0 as if from x_t + u. For an
optimal network that estimate moves by J u, where J = dx_0 / dx_t is the posterior covariance of x_0
times sqrt(abar_t) / (1 - abar_t), which is positive: along u, whatever the network predicts. What
it predicts only decides which part of the estimate x_t itself contributes, beside Z: none for x_0,
x_t / sqrt(abar_t) for eps, sqrt(abar_t) x_t for v. That is why x_t + u replaces x_t there. If Z
alone is moved along dZ, a network that predicts eps takes u for noise and removes it.
"""

import jax
import jax.numpy as jnp

from jdm.arrays import Images, Times
from jdm.diffusion.guidance import base
from jdm.diffusion.guidance.base import LABELLED, Guidance, dot, per_row, select


def representation(network, diffusion, method, targets, scale_fn):
    mask = base.block_mask(network.block_names, method.blocks)

    def eps_fn(x: Images, t: Times):
        g, dz, features = base.gradients(network, x, t, targets)
        _, b = diffusion.scales(t)
        u = scale_fn(t) * b**2 * g
        increase = dot(u, g)

        def move(z, dz):
            return z + per_row(increase / jnp.maximum(dot(dz, dz), base.TINY), z) * dz

        moved = jax.tree.map(move, features, select(dz, mask))
        estimate = network.decode(moved, x + u, t)
        own = estimate.own and (estimate.own[0] - u / b, estimate.own[1])
        return estimate._replace(eps=estimate.eps - u / b, own=own)

    return eps_fn


GUIDANCE = Guidance(representation, default_scale=16.0, takes=(*LABELLED, "blocks"))
