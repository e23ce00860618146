"""Sampling as the test files of jdm.diffusion share it."""

import jax
import numpy as np
import pytest

from jdm.diffusion.method import Method
from jdm.diffusion.samplers import initial_noise, reverse, timesteps


@pytest.fixture(scope="session")
def sample():
    """sample(eps_fn, diffusion, keys, shape, **options of Method) -> images, one for each key."""

    def sample(eps_fn, diffusion, keys, shape, **options):
        method = Method(**dict(sampler="ddim", steps=50, threshold="static") | options)
        times = timesteps(diffusion, method.steps, method.spacing)
        start = initial_noise(diffusion, keys, shape)
        return reverse(eps_fn, diffusion, start, keys, times, method)[0]

    return sample


@pytest.fixture(scope="session")
def draw(sample):
    """draw(eps_fn, diffusion, keys, shape, ...): the same, compiled.

    optimise: whether XLA optimises it too, which pays off for millions of normal draws.
    """

    def draw(eps_fn, diffusion, keys, shape=(2, 2, 1), *, optimise=False, **options):
        def images(keys):
            return sample(eps_fn, diffusion, keys, shape, **options)

        compiler_options = {"xla_backend_optimization_level": 1} if optimise else None
        return np.asarray(jax.jit(images, compiler_options=compiler_options)(keys))

    return draw
