"""jdm.checkpoint: what is saved comes back bit for bit, and damage is never restored."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st

from jdm import checkpoint
from jdm.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
# Late callbacks of a failed save may reach pytest's hook in a later test, where ours is gone.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"channels": 8, "levels": [1, 2]}, "name": "tiny"}
DATA = {"step": 7, "seed": 0}


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def make_params(width=8):
    rng = np.random.default_rng(0)
    conv = {"kernel": rng.normal(size=(3, 3, 2, width)), "bias": np.zeros(3)}
    head = {"kernel": rng.normal(size=(width, 4))}
    return {
        "params": {
            "conv": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), conv),
            "head": jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), head),
        }
    }


@functools.cache
def make_state(width=8):
    params = make_params(width)
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    rng = np.random.default_rng(1)
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 100, x.dtype), opt_state
    )
    return State(jnp.int32(7), params, opt_state, jax.random.key(3))


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(workdir, step, *, width=8, keep=10, **items):
    state = make_state(width)
    weights = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) / 2, x.dtype), state.params)
    items = {"weights": weights, "train_state": state, "data": DATA, "config": CONFIG} | items
    checkpoint.save(workdir, step, keep=keep, **items)
    return items


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def step_dir(workdir, step):
    return Path(workdir) / "checkpoints" / str(step)


def names(workdir):
    return sorted(os.listdir(Path(workdir) / "checkpoints"))


def flip(path, bit=None):
    """Flips one bit, in the middle of the file unless told otherwise."""
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One small saved step, never written to."""
    workdir = tmp_path_factory.mktemp("saved")
    return workdir, save(workdir, 7)


@pytest.fixture
def copy(saved, tmp_path):
    """A private copy of that step, to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


# --- round trips ----------------------------------------------------------------------------------


def test_round_trip_is_bitwise(saved):
    workdir, items = saved
    weights, state = items["weights"], items["train_state"]
    got = checkpoint.restore(workdir, 7, weights=abstract(weights), train_state=abstract(state))
    assert got.keys() == {"weights", "train_state"}
    assert_same(got["weights"], weights)
    assert_same(got["train_state"], state)
    assert checkpoint.read_config(workdir, 7) == CONFIG
    assert checkpoint.read_data(workdir, 7) == DATA


def test_layout(saved):
    workdir, _ = saved
    step = step_dir(workdir, 7)
    assert names(workdir) == ["7"]
    assert {p.name for p in step.iterdir()} >= {
        "weights", "train_state", "data", "config", "checksums.json",
    }  # fmt: skip
    files = [p for p in step.rglob("*") if p.is_file() and p.name != "checksums.json"]
    expected = {str(p.relative_to(step)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert json.loads((step / "checksums.json").read_text()) == expected


def test_relative_and_str_paths(saved, monkeypatch):
    monkeypatch.chdir(saved[0].parent)
    relative = saved[0].name
    assert checkpoint.steps(relative) == [7]
    weights = saved[1]["weights"]
    assert_same(checkpoint.restore(relative, 7, weights=abstract(weights))["weights"], weights)


def test_weights_need_no_train_state(copy, saved):
    """Sampling neither reads nor hashes the optimiser; training notices that it is gone."""
    weights = saved[1]["weights"]
    for path in (step_dir(copy, 7) / "train_state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"garbage")
    assert_same(checkpoint.restore(copy, 7, weights=abstract(weights))["weights"], weights)
    shutil.rmtree(step_dir(copy, 7) / "train_state")
    assert_same(checkpoint.restore(copy, 7, weights=abstract(weights))["weights"], weights)
    assert checkpoint.read_config(copy, 7) == CONFIG
    with pytest.raises(CheckpointError, match="train_state.* is missing"):
        checkpoint.verify(copy, 7)


def test_train_state_and_data_are_optional(tmp_path):
    """What `jdm convert` writes."""
    weights = make_params()
    checkpoint.save(tmp_path, 0, weights=weights, config=CONFIG, keep=1)
    checkpoint.verify(tmp_path, 0)
    assert_same(checkpoint.restore(tmp_path, 0, weights=abstract(weights))["weights"], weights)
    with pytest.raises(CheckpointError, match="holds no train_state"):
        checkpoint.restore(tmp_path, 0, train_state=abstract(weights))
    with pytest.raises(CheckpointError, match="holds no data"):
        checkpoint.read_data(tmp_path, 0)


def test_is_quiet(tmp_path, capfd):
    items = save(tmp_path, 1)
    checkpoint.restore(tmp_path, 1, weights=abstract(items["weights"]))
    checkpoint.read_config(tmp_path, 1)
    with pytest.raises(CheckpointError):
        save(tmp_path, 2, data=object())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- damage ---------------------------------------------------------------------------------------


def test_one_flipped_bit_in_any_file(copy):
    files = sorted(p for p in step_dir(copy, 7).rglob("*") if p.is_file())
    assert len(files) > 20
    for path in files:
        flip(path)
        with pytest.raises(CheckpointError, match="is damaged|is missing|is not listed"):
            checkpoint.verify(copy, 7)
        flip(path)
    checkpoint.verify(copy, 7)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_in_the_checksums(saved, data):
    path = step_dir(saved[0], 7) / "checksums.json"
    content = path.read_bytes()
    bit = data.draw(st.integers(0, len(content.rstrip()) * 8 - 1))
    try:
        flip(path, bit)
        with pytest.raises(CheckpointError):
            checkpoint.verify(saved[0], 7)
    finally:
        path.write_bytes(content)


def test_flipped_bit_in_a_used_item_is_not_restored(copy, saved):
    weights = saved[1]["weights"]
    for path in [p for p in (step_dir(copy, 7) / "weights").rglob("*") if p.is_file()]:
        flip(path)
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.restore(copy, 7, weights=abstract(weights))
        flip(path)
    flip(next(p for p in (step_dir(copy, 7) / "config").rglob("*") if p.is_file()))
    with pytest.raises(CheckpointError, match="config"):
        checkpoint.read_config(copy, 7)


def test_truncated_missing_and_added_files(copy):
    step = step_dir(copy, 7)
    path = step / "weights" / "manifest.ocdbt"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="manifest.ocdbt is damaged"):
        checkpoint.verify(copy, 7)
    path.unlink()
    with pytest.raises(CheckpointError, match="manifest.ocdbt is missing"):
        checkpoint.verify(copy, 7)
    path.write_bytes(content)
    (step / "weights" / "more").touch()
    with pytest.raises(CheckpointError, match="weights/more is not listed"):
        checkpoint.verify(copy, 7)
    (step / "weights" / "more").rename(step / "weights" / ".DS_Store")
    checkpoint.verify(copy, 7)
    (step / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="checksums.json is missing"):
        checkpoint.verify(copy, 7)


def test_newest_whole_sets_damaged_steps_aside(copy):
    folder = copy / "checkpoints"
    for step in (8, 9):
        shutil.copytree(folder / "7", folder / str(step))
    flip(folder / "9" / "weights" / "manifest.ocdbt")
    (folder / "8" / "checksums.json").unlink()
    (folder / "9.bad").mkdir()  # from an earlier time
    lines = []
    assert checkpoint.newest_whole(copy, log=lines.append) == 7
    assert names(copy) == ["7", "8.bad", "9.bad", "9.bad-2"]
    assert (folder / "9.bad-2" / "weights").is_dir()
    assert re.search("9.bad-2: .*manifest.ocdbt is damaged", lines[0])
    assert re.search("8.bad: .*checksums.json is missing", lines[1])
    assert checkpoint.newest_whole(copy, log=lines.append) == 7 and len(lines) == 2
    flip(folder / "7" / "config" / "metadata")
    assert checkpoint.newest_whole(copy, log=lines.append) is None
    assert checkpoint.steps(copy) == []
    save(copy, 9)  # the name is free again, and the bad ones stay
    assert names(copy) == ["7.bad", "8.bad", "9", "9.bad", "9.bad-2"]


def test_newest_whole_of_nothing(tmp_path):
    assert checkpoint.newest_whole(tmp_path / "new") is None


# --- targets that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "leaf", "message"),
    [
        (
            "kernel",
            ((8, 5), "bfloat16"),
            r"head/kernel: expected bfloat16\[8, 5\], found .*8, 4\]",
        ),
        ("kernel", ((8, 4), "float32"), r"head/kernel: expected float32\[8, 4\], found bfloat16"),
        ("kernel", None, r"head/kernel: expected nothing, found bfloat16\[8, 4\]"),
        ("scale", ((4,), "float32"), r"head/scale: expected float32\[4\], found nothing"),
    ],
)
def test_mismatch_names_the_key(saved, key, leaf, message):
    target = abstract(saved[1]["weights"])
    sharding = target["params"]["conv"]["bias"].sharding
    leaf = leaf and jax.ShapeDtypeStruct(leaf[0], jnp.dtype(leaf[1]), sharding=sharding)
    target["params"]["head"][key] = leaf
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(saved[0], 7, weights=target)


def half_and_targets(saved):
    """Weights in half precision, and a function that makes targets of them of another dtype."""
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), saved[1]["weights"])

    def target(dtype):
        return abstract(jax.tree.map(lambda x: jnp.asarray(x, dtype), half))

    return half, target


def test_narrow_floats_are_widened_where_that_is_asked_for(saved, tmp_path):
    half, target = half_and_targets(saved)
    checkpoint.save(tmp_path, 1, weights=half, config=CONFIG, keep=1)
    got = checkpoint.restore(tmp_path, 1, weights=target(np.float32), widen=True)["weights"]
    assert_same(got, jax.tree.map(lambda x: x.astype(np.float32), half))
    with pytest.raises(CheckpointError, match=r"expected float32\[3\], found float16\[3\]"):
        checkpoint.restore(tmp_path, 1, weights=target(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.int32])
def test_widening_changes_no_value(saved, dtype, tmp_path):
    """Neither a wide float to a narrow one, nor a float to what is none or holds other values."""
    half, target = half_and_targets(saved)
    stored = np.float32 if dtype == np.float16 else np.float16
    weights = jax.tree.map(lambda x: x.astype(stored), half)
    checkpoint.save(tmp_path, 1, weights=weights, config=CONFIG, keep=1)
    with pytest.raises(CheckpointError, match=f"expected {jnp.dtype(dtype)}.*, found float"):
        checkpoint.restore(tmp_path, 1, weights=target(dtype), widen=True)


def test_widening_does_not_excuse_a_shape(saved, tmp_path):
    half, target = half_and_targets(saved)
    checkpoint.save(tmp_path, 1, weights=half, config=CONFIG, keep=1)
    wanted = target(np.float32)
    bias = wanted["params"]["conv"]["bias"]
    wanted["params"]["conv"]["bias"] = jax.ShapeDtypeStruct(
        (4,), bias.dtype, sharding=bias.sharding
    )
    with pytest.raises(CheckpointError, match=r"conv/bias: expected float32\[4\], found float16"):
        checkpoint.restore(tmp_path, 1, weights=wanted, widen=True)


def test_a_step_does_not_tell_where_it_was_saved(saved):
    workdir = os.fsencode(saved[0])
    for path in step_dir(saved[0], 7).rglob("*"):
        assert not path.is_file() or workdir not in path.read_bytes()


def test_target_without_sharding(saved):
    target = jax.eval_shape(lambda: saved[1]["weights"])
    with pytest.raises(ValueError, match="no sharding at params/conv/bias"):
        checkpoint.restore(saved[0], 7, weights=target)


# --- names and keeping ----------------------------------------------------------------------------


def test_steps_ignores_other_names(copy):
    folder = copy / "checkpoints"
    for name in ("10", "9", "11.partial", "12.bad", "13.bad-2", "007", "-1", "last"):
        (folder / name).mkdir()
    (folder / "14").touch()
    assert checkpoint.steps(copy) == [7, 9, 10]
    assert checkpoint.newest(copy) == 10


def test_nothing_there_is_said_in_one_sentence(tmp_path, saved):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}.*does not exist"):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match="step 8 in .*, which holds 7$"):
        checkpoint.read_config(saved[0], 8)
    (tmp_path / "checkpoints" / "8.partial").mkdir(parents=True)
    for look in (checkpoint.newest, lambda path: checkpoint.verify(path, 8)):
        with pytest.raises(CheckpointError, match=r"holds 8.partial \(a save that was cut short\)"):
            look(tmp_path)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 10] and names(tmp_path) == ["10", "2"]
    save(tmp_path, 1, keep=1)  # after going back: the new step itself is never the one to go
    assert names(tmp_path) == ["1", "10"]
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 11, keep=0)


def test_existing_step_is_not_overwritten(copy, saved):
    with pytest.raises(CheckpointError, match="7 exists already"):
        save(copy, 7, width=4)
    weights = saved[1]["weights"]
    assert_same(checkpoint.restore(copy, 7, weights=abstract(weights))["weights"], weights)


# --- saves that fail ------------------------------------------------------------------------------


START = """
import os, resource, signal, sys
import jax, numpy as np
from jdm import checkpoint

def weights(size):
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.random(size // 10, np.float32) for i in range(10)}
"""


def run(code, *args, expect=0, **env):
    """Runs START and `code` in a Python of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, "-c", START + code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


FULL_DISK = """
checkpoint.save(sys.argv[1], 1, weights=weights(100), config={}, keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails with EFBIG, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoint.save(sys.argv[1], 2, weights=weights(100_000), config={}, keep=1)
except checkpoint.CheckpointError as error:
    print(error)
"""


def test_failing_write(tmp_path):
    done = run(FULL_DISK, tmp_path)
    assert re.fullmatch(r"could not save .*/2: .*File too large.*\n", done.stdout)
    assert done.stderr == ""  # no tracebacks of Orbax's threads beside the one sentence
    assert names(tmp_path) == ["1"]
    checkpoint.verify(tmp_path, 1)


def test_what_is_still_being_written_after_a_failure_is_removed_too(tmp_path):
    (tmp_path / "1").mkdir()

    def write():
        for i in range(200):
            path = tmp_path / "2.partial.orbax" / "weights" / str(i)
            with contextlib.suppress(OSError):  # removed under its hands
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            time.sleep(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    checkpoint._sweep_failed(epath.Path(tmp_path))
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the permission to mount")
    try:
        save(tmp_path, 1)
        with pytest.raises(CheckpointError, match="could not save .*/2: .*No space left on device"):
            save(tmp_path, 2, width=8000, keep=1)
        assert names(tmp_path) == ["1"]
        checkpoint.verify(tmp_path, 1)
        save(tmp_path, 2, keep=1)
        assert names(tmp_path) == ["2"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    "moment", ["checkpoint.ocp.StandardCheckpointHandler.finalize", "checkpoint._seal"]
)
def test_killed_while_saving(tmp_path, moment):
    """Killed while Orbax writes, and before the checksums."""
    kill = f"{moment} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
    call = "checkpoint.save(sys.argv[1], 1, weights=weights(100), config={}, keep=1)"
    run(kill + call, tmp_path, expect=-signal.SIGKILL)
    assert checkpoint.steps(tmp_path) == [] and any(".partial" in name for name in names(tmp_path))
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.newest(tmp_path)
    save(tmp_path, 1)
    assert names(tmp_path) == ["1"]
    assert checkpoint.newest_whole(tmp_path) == 1


# --- devices and processes ------------------------------------------------------------------------

MESH = """
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

def target(n):
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    return jax.ShapeDtypeStruct((8, 6), np.float32, sharding=NamedSharding(mesh, P("data")))

def array(n):
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    return jax.make_array_from_callback((8, 6), target(n).sharding, lambda index: values[index])
"""

RESHARD = """
checkpoint.save(sys.argv[1], 1, weights={"w": array(4)}, config={}, keep=1)
for n in (4, 2, 1):
    got = checkpoint.restore(sys.argv[1], 1, weights={"w": target(n)})["weights"]["w"]
    assert got.sharding == target(n).sharding and len(got.addressable_shards) == n
    np.testing.assert_array_equal(got, array(1))
"""


def test_restore_on_fewer_devices(tmp_path):
    run(MESH + RESHARD, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)}
    got = checkpoint.restore(tmp_path, 1, weights=target)["weights"]["w"]
    np.testing.assert_array_equal(got, np.arange(48, dtype=np.float32).reshape(8, 6))


PROCESSES = """
from jax.experimental import multihost_utils

workdir, port, rank = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(rank))
for step in (1, 2, 3):
    checkpoint.save(workdir, step, weights={"w": array(4)}, config={}, keep=2)
    assert checkpoint.steps(workdir) == [[1], [1, 2], [2, 3]][step - 1]
    multihost_utils.sync_global_devices("looked")
if rank == "0":
    os.truncate(f"{workdir}/checkpoints/3/weights/manifest.ocdbt", 10)
lines = []
assert checkpoint.newest_whole(workdir, log=lines.append) == 2
assert len(lines) == (rank == "0")
got = checkpoint.restore(workdir, 2, weights={"w": target(4)})["weights"]["w"]
for shard, want in zip(got.addressable_shards, array(4).addressable_shards, strict=True):
    np.testing.assert_array_equal(shard.data, want.data)
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run, MESH + PROCESSES, tmp_path, port, r, **flags) for r in "01"]
    for job in jobs:
        job.result()
    assert names(tmp_path) == ["2", "3.bad"]
