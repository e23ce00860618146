"""One tiny training run, built once for all tests of jdm.training."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jdm.configs import base
from jdm.mesh import make_mesh, replicated, to_global
from jdm.training.build import Run, build


class Tiny(NamedTuple):
    """A run of a one-level network with learned variance, and a batch with labels left out."""

    config: ConfigDict
    run: Run
    batch: dict[str, np.ndarray]

    def start(self):
        """The state before the first step; a step consumes it."""
        return self.run.init(jax.random.key(0))

    def steps(self, state, count: int):
        """(state after so many steps on the batch, the averages of each)."""
        batch, seen = to_global(self.batch, make_mesh()), []
        for _ in range(count):
            state, averages = self.run.step(state, batch, jax.random.key(1))
            seen.append({name: float(total / n) for name, (total, n) in averages.items()})
        return state, seen


def tiny_config() -> ConfigDict:
    """What takes long to compile and is tested elsewhere is left out: dropout and clipping.

    The history of losses is the part of the state that not every run has.
    """
    config = base.get_config()
    config.model.update(channels=8, multipliers=(1,), blocks=1, attention=(), heads=2)
    config.model.update(head_width=16, learned_variance=True, dropout=0.0, head_dropout=0.0)
    config.diffusion.update(steps=100, variance="learned")
    config.loss.update(min_snr_gamma=5.0)
    config.optim.update(lr=1e-2, clip_norm=0.0)
    config.train.update(t_sampler="loss_second_moment")
    return config


@pytest.fixture(scope="session")
def tiny_run() -> Tiny:
    config, rng = tiny_config(), np.random.default_rng(0)
    labels = np.arange(16, dtype=np.int32) % 10
    labels[:5] = -1  # on eight devices: two without any label
    labels[::2] = -1  # of two parts of the batch: one without any label
    images = rng.integers(0, 256, size=(16, 8, 8, 1), dtype=np.uint8)
    return Tiny(config, build(config, replicated(make_mesh())), {"image": images, "label": labels})
