"""Classifier guidance: Dhariwal & Nichol 2021, algorithm 2.

(14)  eps - s sqrt(1 - abar_t) g,   g = grad_x log p(target | x_t)

The classifier is the joint network's own, or that of another network.
"""

import jax

from jdm.arrays import Images, Times
from jdm.diffusion.guidance.base import LABELLED, Guidance, log_likelihood


def pixel(network, diffusion, method, targets, scale_fn):
    def eps_fn(x: Images, t: Times):
        def objective(x):
            features = network.encode(x, t)
            return log_likelihood(network, features, t, targets), features

        g, features = jax.grad(objective, has_aux=True)(x)
        estimate = network.decode(features, x, t)
        _, b = diffusion.scales(t)
        return estimate._replace(eps=estimate.eps - scale_fn(t) * b * g)

    return eps_fn


GUIDANCE = Guidance(pixel, default_scale=6.0, takes=(*LABELLED, "classifier"))
