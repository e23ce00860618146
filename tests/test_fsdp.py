"""exec.mesh="fsdp": weights and optimiser split over the devices; the same losses and files."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jdm
from jdm import mesh
from jdm.config import load_config
from jdm.errors import InvalidValue
from jdm.tracking import read_metrics

SMALL = ("model.channels=16", "model.multipliers=(1,)", "model.attention=()")
SMALL += ("model.head=published", "eval.every=0", "checkpoint.every=0", "checkpoint.keep=99")
CHANGES = [f"--config.{change}" for change in SMALL]
CHAIN = [(1, "data"), (2, "fsdp"), (8, "fsdp"), (8, "fsdp")]  # (devices, mesh)

EIGHT_DEVICES = """
import sys
from pathlib import Path

import jax
import numpy as np

from jdm import mesh, startup, trainer
from jdm.config import load_config
from jdm.errors import InvalidValue
from jdm.numerics import key_of

startup.collect_rarely()
folder, chain, *changes = Path(sys.argv[1]), eval(sys.argv[2]), *sys.argv[3:]

def config_of(name, *more):
    return load_config("tiny", [*changes, f"--config.exec.mesh={name}", *more])

def train(workdir, devices, name, steps):
    trainer.make_mesh = lambda: mesh.make_mesh(jax.devices()[:devices])
    trainer.train(config_of(name, f"--config.train.steps={steps}"), folder / workdir)

train("straight", 1, "data", len(chain))
for steps, mesh_of_step in enumerate(chain, 1):
    if steps == len(chain) or mesh_of_step != chain[steps]:
        train("chain", *mesh_of_step, steps)

eight = mesh.make_mesh()
try:
    trainer.prepare(config_of("fsdp", "--config.data.batch_size=12"), eight)
except InvalidValue as error:
    assert str(error) == "config.data.batch_size=12 does not divide by the 8 devices"
else:
    raise AssertionError("accepted")

# A warm start: the arrays lie where the step expects them, with the values of the source.
config = config_of("fsdp", f"--config.train.init_from={folder / 'straight'}")
run = trainer.prepare(config, eight)
source = trainer.warm_source(config, run)
state = trainer.begin(config, run, key_of(0), source, {})
for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(run.state), strict=True):
    assert found.sharding == wanted.sharding
for found, wanted in zip(jax.tree.leaves(state.ema), jax.tree.leaves(source.weights), strict=True):
    np.testing.assert_array_equal(found, wanted)

# The largest published network: nothing of it is allocated.
state = trainer.prepare(load_config("reference/cifar10", ["--config.exec.mesh=fsdp"]), eight).state
for part in (state, state.params, state.ema, state.optimiser):
    share, _ = mesh.share_of_each(part)
    assert 1 / 8 <= share <= 1 / 7, share
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs of as many steps, "straight" on one device, and "chain", whose steps
    are resumed on the meshes of CHAIN. And what was printed."""
    folder = tmp_path_factory.mktemp("fsdp")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, folder, repr(CHAIN), *CHANGES],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def assert_same_losses(ours, theirs):
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            if name.startswith("train/") and name != "train/images_per_second":
                assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)


def assert_same_weights(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Adam moves a weight whose gradient is rounding errors alone by 1e-3 a step, at most; the
        # EMA by a tenth of that in the first steps.
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_run_that_is_resumed_on_other_meshes_has_the_same_losses(runs):
    straight, chain = (read_metrics(runs[0] / name) for name in ("straight", "chain"))
    assert len(chain) == len(CHAIN)
    assert_same_losses(chain, straight)
    assert_same_weights(*(jdm.load(runs[0] / name).weights for name in ("straight", "chain")))
    ends = [rows[-1]["eval/cross_entropy"] for rows in (straight, chain)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


def test_what_each_device_holds_is_said(runs):
    said = [line for line in runs[1].splitlines() if line.startswith("fsdp: ")]
    shares = [float(line.split("holds ")[1].split("%")[0]) / 100 for line in said]
    for share, (devices, _) in zip(shares, CHAIN[1:3], strict=True):
        assert 1 / devices < share < 1 / devices + 0.1  # of this tiny network much is whole
    assert all(line.endswith("arrays, small ones, are whole") for line in said)


def test_a_checkpoint_of_split_weights_is_like_any_other(runs, run, tmp_path):
    folder = runs[0] / "chain"
    joint = jdm.load(folder)  # the last step was on eight devices
    assert joint.config.exec.mesh == "fsdp"
    samples = jdm.sample(joint, 2, steps=2, sampler="ddim")
    assert samples.images.shape == (2, 8, 8, 1)
    again = jdm.sample(folder / "checkpoints" / "4", 2, steps=2, sampler="ddim")
    np.testing.assert_array_equal(samples.images, again.images)
    path = folder / "checkpoints" / "4"
    done = run("eval", f"--checkpoint={path}", f"--out={tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr


TWO_PROCESSES = """
import sys

import jdm
from jdm import mesh, trainer
from jdm.config import load_config
from jdm.distributed import Processes, joined

evaluate = trainer.evaluate

def checked(joint, metrics, split, options):
    share, _ = mesh.share_of_each(joint.weights)
    assert share < 0.35, share  # of four devices, two here; some arrays are whole
    assert joint.mesh.size == 2
    if joint.step == 4:  # before the step is compiled
        print("digest:", joint.digest)
        samples = jdm.sample(joint, 2, steps=2, sampler="ddim", guidance="none")
        print("pixels:", samples.images.tobytes().hex())
    return evaluate(joint, metrics, split, options)

trainer.evaluate = checked
address, index, workdir, *changes = sys.argv[1:]
with joined(Processes(coordinator=address, processes=2, process=int(index)), {}):
    for steps in (2, 4):
        more = ["--config.exec.mesh=fsdp", f"--config.train.steps={steps}"]
        trainer.train(load_config("tiny", [*changes, *more]), workdir)
"""


def test_two_processes_train_as_one_and_resume(runs, tmp_path, two_processes, assert_same_images):
    ended = two_processes(TWO_PROCESSES, tmp_path / "run", *CHANGES)
    assert [process.returncode for process in ended] == [0, 0], ended
    ours, straight = read_metrics(tmp_path / "run"), read_metrics(runs[0] / "straight")
    assert_same_losses(ours, straight)
    assert_same_weights(jdm.load(tmp_path / "run").weights, jdm.load(runs[0] / "straight").weights)
    ends = [rows[-1]["eval/cross_entropy"] for rows in (straight, ours)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    saved = jdm.load(tmp_path / "run")  # an EMA that is split over processes is this one
    samples = jdm.sample(saved, 2, steps=2, sampler="ddim", guidance="none")
    for process in ended:
        said = dict(line.split(": ", 1) for line in process.stdout.splitlines() if ": " in line)
        assert said["digest"] == saved.digest
        pixels = np.frombuffer(bytes.fromhex(said["pixels"]), np.uint8)
        assert_same_images(pixels.reshape(samples.images.shape), samples.images)


@pytest.mark.parametrize(
    ("shape", "devices", "axis"),
    [
        ((3, 3, 128, 256), 8, 3),
        ((3, 3, 256, 128), 8, 2),
        ((512, 512), 8, 1),
        ((3, 3, 130, 64), 8, 3),
        ((1023, 1025), 8, None),
        ((1023,), 1, None),
        ((512,), 8, None),
        ((3, 3, 128, 256), 1, None),
    ],
)
def test_the_axis_that_is_split(shape, devices, axis):
    assert mesh.MESHES["fsdp"](shape, devices) == axis
    assert mesh.MESHES["data"](shape, devices) is None


def test_an_unknown_mesh_is_named():
    with pytest.raises(
        InvalidValue, match=r"config.exec.mesh='fdsp'.*: data, fsdp; did you mean fsdp"
    ):
        load_config("tiny", ["--config.exec.mesh=fdsp"])
