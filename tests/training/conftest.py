"""What the tests of jdm.training share: a tiny training run, and a network with known outputs."""

import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jdm.configs import base
from jdm.diffusion.process import Diffusion
from jdm.mesh import make_mesh, to_global
from jdm.nn.model import JointModel
from jdm.nn.unet import Features
from jdm.training.build import Run, build
from jdm.training.loss import JointLoss
from jdm.training.step import STREAMS
from jdm.training.t_sampler import T_SAMPLERS


class Tiny(NamedTuple):
    """A run of a one-level network with learned variance, and a batch with labels left out."""

    config: ConfigDict
    run: Run
    batch: dict[str, np.ndarray]

    def start(self):
        """The state before the first step; a step consumes it."""
        return self.run.init(jax.random.key(0))

    def steps(self, state, count: int):
        """(state after `count` steps on the batch, the metrics of each)."""
        batch, seen = to_global(self.batch, make_mesh()), []
        for _ in range(count):
            state, metrics = self.run.step(state, batch, jax.random.key(1))
            seen.append({name: float(total / n) for name, (total, n) in metrics.items()})
        return state, seen


def tiny_config() -> ConfigDict:
    """Without what takes long to compile and is tested elsewhere: dropout and clipping.

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
    return Tiny(config, build(config, make_mesh()), {"image": images, "label": labels})


# A network with known outputs.


class Toy(JointModel):
    """Decodes to the parameter `raw`; its logits are image mean · `slope` + t · `clock`."""

    def setup(self):
        pass

    def encode(self, x, t, perturbations=None, train=False):
        assert train
        SEEN.append((x, t))
        return Features(x, (t.astype(jnp.float32),))

    def decode(self, features, t, train=False):
        CALLED.append("decode")
        DECODED[:] = features.mid, t
        raw = self.get_variable("params", "raw")
        return jnp.broadcast_to(raw, (*features.mid.shape[:3], raw.shape[-1]))

    def classify(self, features, t, train=False):
        CALLED.append("classify")
        (times,) = features.skips
        t = t + 0 * times  # the features have as many rows as there are times
        slope, clock = (self.get_variable("params", name) for name in ("slope", "clock"))
        return features.mid.mean(axis=(1, 2, 3))[:, None] * slope + t[:, None] * clock


SEEN = []  # what the encoder was given, in order
CALLED = []  # what else was called
DECODED = []  # what was decoded last
DIFFUSION = Diffusion(50)
FIELDS = dict(
    **base.get_config().model, dtype="float32", attention_implementation="auto", remat="none"
)
MODEL = Toy(**FIELDS)
PARAMS = {
    "raw": jnp.zeros(1),
    "slope": jnp.asarray([1.0, -2.0, 0.5]),
    "clock": jnp.asarray([0.01, 0.0, -0.02]),
}
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, size=(8, 4, 4, 1)), jnp.uint8),
    "label": jnp.asarray([0, 1, 2, -1, 1, -1, 0, 2], jnp.int32),
}
X0 = np.asarray(BATCH["image"]) / 127.5 - 1


def keys(**changed: int):
    """A key for each stream; those of the changed streams are others."""
    return {name: jax.random.key(10 * changed.get(name, 0) + i) for i, name in enumerate(STREAMS)}


def joint_loss(diffusion=DIFFUSION, model=MODEL, **settings) -> JointLoss:
    config = base.get_config()
    config.loss.update(settings)
    return JointLoss(model, diffusion, config.loss)


def rows_of(loss_fn, batch=BATCH, drawn=None, step=0):
    """The rows of a batch with uniformly drawn t."""
    drawn = drawn or keys()
    t_sampler = T_SAMPLERS["uniform"](loss_fn.diffusion.steps)
    t, importance = t_sampler.draw(drawn["t"], None, len(batch["image"]))
    return loss_fn.rows(batch, t, importance, drawn, jnp.int32(step))


def evaluate(loss_fn, params=PARAMS, batch=BATCH, step=0, batch_stats=(), **changed):
    """The loss, sums and counts of the metrics, and what the encoder saw, input after input: x and
    t of the noised images, then of the clean ones.

    Not compiled: small operations are compiled once for all tests, a whole loss for each.
    """
    SEEN.clear()
    CALLED.clear()
    rows = rows_of(loss_fn, batch, keys(**changed), step)
    loss, (batch_stats, metrics, _) = loss_fn(params, dict(batch_stats), rows, keys()["dropout"])
    (seen,) = SEEN  # one encoder pass, in which the first images of all inputs come first
    n = len(rows.inputs)
    x, t = (jnp.concatenate([each[i::n] for i in range(n)]) for each in seen)
    return SimpleNamespace(
        loss=float(loss),
        sums={name: float(total) for name, (total, _) in metrics.items()},
        counts={name: float(count) for name, (_, count) in metrics.items()},
        batch_stats=batch_stats,
        x=x,
        t=t,
    )


def gradient(loss_fn, params=PARAMS, batch=BATCH):
    rows = rows_of(loss_fn, batch)
    return jax.grad(lambda params: loss_fn(params, {}, rows, keys()["dropout"])[0])(params)


def entropies(x, t, labels):
    """Cross-entropy of each labelled row, from the toy's closed form in float64."""
    slope, clock = (np.asarray(PARAMS[name], np.float64) for name in ("slope", "clock"))
    mean = np.asarray(x, np.float64).mean(axis=(1, 2, 3))
    logits = mean[:, None] * slope + np.asarray(t)[:, None] * clock
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [-log_p[i, label] for i, label in enumerate(np.asarray(labels)) if label >= 0]


@pytest.fixture(scope="session")
def toy():
    """This module: the toy network, a batch for it, and functions that compute its loss."""
    return sys.modules[__name__]
