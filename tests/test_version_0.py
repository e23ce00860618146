"""A work folder whose config has version 0: it loads, and training resumes with the same losses.

tests/fixtures/version_0 was written by the code before version 1 (revision 7921f95):

    jdm train --config=tiny --workdir=version_0 --config.train.steps=2 <FLAGS, with the old names>

expected.json has the metrics that this code logged for steps 3 and 4, when the run was resumed. It
drew dropout by JAX's generator, as Flax does, for a batch in which the clean images follow the
noised ones, and so does the test that compares them.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdm
from jdm import checkpoint, trainer
from jdm.config import load_config
from jdm.nn import layers
from jdm.tracking import read_metrics
from jdm.training import loss

FIXTURE = Path(__file__).parent / "fixtures" / "version_0"
FLAGS = (
    "--config.model.channels=4",
    "--config.model.multipliers=(1,)",
    "--config.model.attention=()",
    "--config.model.heads=1",
    "--config.model.head_width=8",
    "--config.exec.accumulate=2",
    "--config.checkpoint.every=2",
)


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A copy of the work folder."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "run"))


def test_a_work_folder_of_version_0_loads(workdir):
    assert "version" not in json.loads((workdir / "config.json").read_text())
    assert "version" not in checkpoint.read_config(workdir, 2)
    config = jdm.load(workdir).config
    assert config.version == 1
    assert config.exec.accumulate == 2
    assert config.loss.terms == ("diffusion", "classifier")
    assert config == load_config("tiny", [*FLAGS, "--config.train.steps=2"])


def flax_dropout(x, key, rate):
    """`layers.dropout`, with the random numbers of Flax's."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def test_a_run_of_version_0_resumes_with_the_same_losses(workdir, monkeypatch):
    monkeypatch.setattr(layers, "dropout", flax_dropout)
    monkeypatch.setattr(loss, "_in_turn", jnp.concatenate)
    monkeypatch.setattr(loss, "_separated", jnp.split)
    trainer.train(load_config("tiny", [*FLAGS, "--config.train.steps=4"]), workdir)
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(
        rows[2:], json.loads((FIXTURE / "expected.json").read_text()), strict=True
    ):
        found = {name: row[name] for name in expected}
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
