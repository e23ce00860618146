"""(14a): guidance by the features Z, which the decoder and the classifier share.

After Deja et al. 2023, section 4, whose own update is (14c). Let x_0(Z, x_t) be the image that is
estimated from Z and x_t. Z is moved along its total derivative dZ, and x_t along its gradient g:

(14a)  x_0(Z + P, x_t + u),   u = s sqrt(N) g,   P = (u · g) dZ / mean_i |dz_i|²

with N the number of an image's values, height times width times channels.

The sampler goes on from x_t, so it is returned as eps(Z + P, x_t + u) - u / sqrt(1 - abar_t).

Length: standard normal noise has a length of sqrt(N), so that u is s |g| times as long as the
noise, whatever the size of an image. To first order, u increases log p(target) by u · g. P has the
one length at which the moves P_i of the n + 1 representations z_i, each made alone, increase it by
as much on average. Both keep their meaning at every t and for every network.

Direction: Z + P stands for the Z of x_t + u, so that (14a) estimates x_0 as if from x_t + u. For an
optimal network that estimate moves by J u, where J = dx_0 / dx_t is the posterior covariance of x_0
times sqrt(abar_t) / (1 - abar_t), which is positive: along u, whatever the network predicts. J is
small where x_t tells little of x_0, so that the image is guided most at low noise. What the network
predicts only decides which part of the estimate x_t itself contributes, beside Z: none for x_0,
x_t / sqrt(abar_t) for eps, sqrt(abar_t) x_t for v. That is why x_t + u replaces x_t there. If Z
alone is moved along dZ, a network that predicts eps takes u for noise and removes it.
"""

import math

import jax
import jax.numpy as jnp

from jdm.arrays import Images, Times
from jdm.diffusion.guidance import base
from jdm.diffusion.guidance.base import LABELLED, Guidance, dot, per_row, select


def representation(network, diffusion, method, targets, scale_fn):
    mask = base.block_mask(network.block_names, method.blocks)

    def eps_fn(x: Images, t: Times):
        g, dz, features = base.gradients(network, x, t, targets)
        u = scale_fn(t) * math.sqrt(math.prod(x.shape[1:])) * g
        squares = [dot(dz_i, dz_i) for dz_i in jax.tree.leaves(dz)]
        length = dot(u, g) / jnp.maximum(sum(squares) / len(squares), base.TINY)
        moved = jax.tree.map(lambda z, dz: z + per_row(length, z) * dz, features, select(dz, mask))
        estimate = network.decode(moved, x + u, t)
        _, b = diffusion.scales(t)
        own = estimate.own and (estimate.own[0] - u / b, estimate.own[1])
        return estimate._replace(eps=estimate.eps - u / b, own=own)

    return eps_fn


GUIDANCE = Guidance(representation, default_scale=0.7, takes=(*LABELLED, "blocks"))
