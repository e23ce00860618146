"""jdm.checkpoint where saving fails, and with several devices and processes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jdm import checkpoint, step_files
from jdm.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
# Late callbacks of a failed save may reach pytest's hook during a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def names(workdir):
    return sorted(os.listdir(Path(workdir) / "checkpoints"))


def save(workdir, step, size=100, keep=10):
    weights = {"w": np.random.default_rng(0).random(size, np.float32)}
    checkpoint.save(workdir, step, weights=weights, config={}, keep=keep)


# --- saves that fail ------------------------------------------------------------------------------

START = """
import os, resource, signal, sys
import jax, numpy as np
from jdm import checkpoint

def weights(size):
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.random(size // 10, np.float32) for i in range(10)}
"""


def run(code, *args, **env):
    """Runs START and `code` in another process, with these arguments and environment variables."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, "-c", START + code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
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
    assert done.stderr == ""  # no tracebacks of Orbax's threads
    assert names(tmp_path) == ["1"]
    checkpoint.verify(tmp_path, 1)


def test_files_written_after_a_failure_are_removed_too(tmp_path):
    (tmp_path / "1").mkdir()

    def write():
        for i in range(200):
            path = tmp_path / "2.partial.orbax-checkpoint-tmp" / "weights" / str(i)
            with contextlib.suppress(OSError):  # removed between the two calls
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            time.sleep(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    step_files.sweep_failed(epath.Path(tmp_path))
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the permission to mount")
    try:
        save(tmp_path, 1)
        with pytest.raises(CheckpointError, match="could not save .*/2: .*No space left on device"):
            save(tmp_path, 2, size=400_000, keep=1)
        assert names(tmp_path) == ["1"]
        checkpoint.verify(tmp_path, 1)
        save(tmp_path, 2, keep=1)
        assert names(tmp_path) == ["2"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


KILLED = """
# Forked, which is safe before JAX is used: importing it takes longer than saving.
moments = [(checkpoint.ocp.PyTreeCheckpointHandler, "finalize"), (checkpoint, "_seal")]
for workdir, moment in zip(sys.argv[1:], moments, strict=True):
    if os.fork() == 0:
        setattr(*moment, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.save(workdir, 1, weights=weights(100), config={}, keep=1)
    assert os.wait()[1] == signal.SIGKILL
"""


def test_killed_while_saving(tmp_path):
    """Killed while Orbax writes, and before the checksums are written."""
    workdirs = [tmp_path / "writing", tmp_path / "sealing"]
    run(KILLED, *workdirs)
    for workdir in workdirs:
        assert checkpoint.steps(workdir) == [] and "1.partial" in "".join(names(workdir))
        with pytest.raises(CheckpointError, match="an interrupted save"):
            checkpoint.newest(workdir)
        save(workdir, 1)
        assert names(workdir) == ["1"]
        assert checkpoint.newest_whole(workdir) == 1


def test_a_save_that_cannot_be_read_gets_no_final_name(tmp_path, monkeypatch):
    """Orbax only logs it when it does not find what it has written."""
    save(tmp_path, 1)
    finalize = (checkpoint.ocp.PyTreeCheckpointHandler, "finalize")
    monkeypatch.setattr(*finalize, lambda *args, **kwargs: None)
    with pytest.raises(CheckpointError, match="could not save .*/2: ") as info:
        save(tmp_path, 2)
    assert "\n" not in str(info.value)
    assert names(tmp_path) == ["1"]


def test_a_typed_random_key_is_refused(tmp_path):
    """It would come back as an array of its numbers."""
    key = {"a": {"key": jax.random.key(0)}}
    said = (
        r"could not save .*/1: .* does not fit at a/key: expected key<fry>\[\], found uint32\[2\]"
    )
    with pytest.raises(CheckpointError, match=said):
        checkpoint.save(tmp_path, 1, weights=key, config={}, keep=1)
    assert checkpoint.steps(tmp_path) == []


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
import contextlib
import io

from jax.experimental import multihost_utils

workdir, port, rank = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(rank))
for step in (1, 2, 3):
    checkpoint.save(workdir, step, weights={"w": array(4)}, config={}, keep=2)
    assert checkpoint.steps(workdir) == [[1], [1, 2], [2, 3]][step - 1]
    multihost_utils.sync_global_devices("listed")
if rank == "0":
    os.truncate(f"{workdir}/checkpoints/3/weights/manifest.ocdbt", 10)
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert checkpoint.newest_whole(workdir) == 2
assert len(said.getvalue().splitlines()) == (rank == "0")
got = checkpoint.restore(workdir, 2, weights={"w": target(4)})["weights"]["w"]
for shard, want in zip(got.addressable_shards, array(4).addressable_shards, strict=True):
    np.testing.assert_array_equal(shard.data, want.data)
"""


def test_two_processes(tmp_path, free_port):
    workdir = tmp_path / "lr[0-1]"  # a pattern that does not match itself
    port = free_port()
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run, MESH + PROCESSES, workdir, port, r, **flags) for r in "01"]
    for job in jobs:
        job.result()
    assert names(workdir) == ["2", "3.bad"]
