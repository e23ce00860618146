"""Work folders in a bucket: what a run leaves there at any moment, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jdm
from jdm import checkpoint, lease, resume, storage, trainer
from jdm.checkpoint import CheckpointError
from jdm.config import load_config
from jdm.errors import Failure, InvalidValue
from jdm.files import LOCK
from jdm.joint import load
from jdm.serve import about
from jdm.storage import BucketError, storage_of
from jdm.tracking import MetricLog, read_metrics

JDM = Path(sys.executable).with_name("jdm")
RUN = "gs://bucket/runs/a"
SMALL = [
    "--config.model.multipliers=(1,)",
    "--config.model.attention=()",
    "--config.train.steps=3",
    "--config.checkpoint.every=1",
    "--config.checkpoint.keep=2",
    "--config.eval.every=0",
]


def steps_in(bucket) -> set[str]:
    """The steps of which there is any object."""
    found = [re.match("runs/a/checkpoints/([^/]+)/", name) for name in bucket.objects]
    return {one[1] for one in found if one}


def upload(bucket, folder: Path, name: str = "runs/a") -> None:
    """As `gcloud storage cp --recursive` does."""
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.objects[f"{name}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


def save(step, size=100, keep=10, workdir=RUN):
    weights = {"w": np.random.default_rng(step).random(size, np.float32)}
    checkpoint.save(workdir, step, weights=weights, config={"step": step}, keep=keep)


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_weights(bucket, tiny, run):
    command = ["train", "--config=tiny", f"--workdir={RUN}"]
    command += ["--config.checkpoint.keep=1", "--config.eval.every=0"]
    started, logged = [], []

    def kill(method, name):
        if name.endswith("checksums.json") and method == "POST":
            logged.append(len(bucket.objects["runs/a/metrics.jsonl"].splitlines()))
        if "/4/weights/ocdbt.process_0/d/" in name and method == "POST":
            started[0].send_signal(signal.SIGKILL)
            started[0].wait()

    bucket.before = kill
    started.append(subprocess.Popen([JDM, *command], stdout=-1, stderr=-1, text=True))
    said = started[0].communicate(timeout=300)
    assert started[0].returncode == -signal.SIGKILL, said
    bucket.before = lambda *_: None
    assert logged == [2]  # every row up to a checkpoint is there before it
    assert steps_in(bucket) == {"2", "4"} and checkpoint.steps(RUN) == [2]
    assert f"runs/a/{LOCK}" in bucket.objects

    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f"resuming from step 2 of {RUN}" in done.stdout and "waiting" not in done.stdout
    checkpoint.verify(RUN, 4)
    assert load(RUN).digest == load(tiny).digest  # that was not disturbed, and is on a disk
    rows = [read_metrics(folder) for folder in (RUN, tiny)]
    losses = [[(row["step"], row["train/loss"]) for row in one] for one in rows]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]
    kinds = {name.split("/")[2].partition(".out")[0] for name in bucket.objects}
    expected = {"config.json", "metrics.jsonl", "metrics.replaced.jsonl", "checkpoints", "events"}
    assert kinds == expected and steps_in(bucket) == {"4"}
    assert "is trained already: 4 of 4" in run(*command).stdout


def test_a_work_folder_that_was_copied_to_a_bucket_is_one_there(bucket, tiny, run, tmp_path):
    upload(bucket, tiny)
    joint, before = load(tiny), dict(bucket.objects)
    assert load(f"{RUN}/checkpoints/2").digest == load(tiny, 2).digest
    config = load_config("tiny", [f"--config.train.init_from={RUN}"])
    network = trainer.prepare(config, trainer.make_mesh())
    assert resume.warm_source(config, network).digest == joint.digest
    image = tmp_path / "a.npz"
    done = run("sample", f"--checkpoint={RUN}", "--seeds=0-1", "--steps=2", f"--out={image}")
    assert done.returncode == 0, done.stderr
    drawn = jdm.sample(joint, seeds=range(2), steps=2).images
    np.testing.assert_array_equal(np.load(image)["arr_0"], drawn)
    assert bucket.objects == before


# --- what is refused ------------------------------------------------------------------------------

SAID = "me@example.org does not have access to"
REFUSED = {  # what the bucket refuses: the end of the sentence
    ("LIST", "runs", 403): f"may not be used with the credentials at hand ({SAID} LIST runs/a); ",
    ("LIST", "runs", 401): f"may not be used with the credentials at hand ({SAID} LIST runs/a, 401",
    ("POST", "runs", 403): f"may not be written with the credentials at hand ({SAID} POST runs/a/",
}


@pytest.mark.parametrize(("method", "pattern", "status"), REFUSED)
def test_a_bucket_without_permission_is_one_sentence(bucket, run, method, pattern, status):
    bucket.refused[method, pattern] = status
    done = run("train", "--config=tiny", f"--workdir={RUN}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    said = f"jdm train: --workdir='{RUN}' {REFUSED[method, pattern, status]}"
    assert done.stderr.startswith(said) and "compiling" not in done.stdout
    assert not bucket.objects
    if method == "LIST":
        done = run("sample", f"--checkpoint={RUN}", "--out=x.png")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(
            said.replace("train", "sample").replace("workdir", "checkpoint")
        )


def test_a_bucket_that_does_not_exist_is_one_sentence(bucket, run):
    flags = {"train": ["--config=tiny", "--workdir=gs://nobody/x"]}
    flags["sample"] = ["--checkpoint=gs://nobody/x", "--out=x.png"]
    for command, (*others, path) in (("train", flags["train"]), ("sample", flags["sample"][::-1])):
        done = run(command, *others, path)
        flag = path.partition("=")[0]
        said = f"jdm {command}: {flag}='gs://nobody/x' is in no bucket: nobody does not exist\n"
        assert (done.returncode, done.stderr, done.stdout) == (2, said, "")


def test_an_empty_folder_of_a_bucket_holds_no_model(bucket, run):
    done = run("sample", f"--checkpoint={RUN}", "--out=x.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"no checkpoint in {RUN}/checkpoints, which does not exist" in done.stderr


def test_without_gcsfs_the_extra_is_named(bucket, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    storage._bucket.cache_clear()
    done = run("train", "--config=tiny", f"--workdir={RUN}")
    said = "jdm train: gs:// needs gcsfs: pip install 'jdm[gcs]'\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_damaged_object_is_never_restored(bucket, tiny, capsys):
    upload(bucket, tiny)
    name = max(n for n in bucket.objects if "/4/weights/d/" in n)
    content = bytearray(bucket.objects[name])
    content[len(content) // 2] ^= 1
    bucket.objects[name] = bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it differs from its checksum"):
        jdm.load(RUN)
    assert checkpoint.newest_whole(RUN) == 2
    assert f"set aside a damaged checkpoint as {RUN}/checkpoints/4.bad: " in capsys.readouterr().out
    assert steps_in(bucket) == {"2", "4.bad"}
    assert bucket.objects[name.replace("/4/", "/4.bad/")] == bytes(content)


def test_a_bucket_that_does_not_answer_is_not_an_empty_one(bucket):
    """epath says of such a folder that it does not exist; a run would begin again."""
    save(1)
    for status in (403, 400):
        bucket.refused["LIST", ""] = status
        for ask in (checkpoint.steps, checkpoint.newest_whole, checkpoint.stored_config):
            with pytest.raises(BucketError, match=f"{RUN}/checkpoints "):
                ask(RUN)
        bucket.refused.clear()
    bucket.refused["GET", "checksums"] = 403  # nor is a step damaged that cannot be read
    with pytest.raises(BucketError, match="checksums.json may not be used"):
        checkpoint.newest_whole(RUN)
    assert steps_in(bucket) == {"1"}


@pytest.mark.parametrize("path", [RUN, "hf://me/digits"])
def test_the_page_looks_for_no_report_beside_a_model_that_is_elsewhere(path, monkeypatch):
    monkeypatch.setattr(about, "_measured", lambda joint: about.Facts({}, "measured"))
    assert about.facts_of(jdm.load("digits"), path, None) == about.Facts({}, "measured")


# --- steps ----------------------------------------------------------------------------------------


def test_at_every_moment_of_a_save_all_steps_that_count_are_whole(bucket):
    save(1)
    bucket.states = [dict(bucket.objects)]
    save(2, keep=1)  # and deletes step 1
    states, bucket.states = bucket.states, None
    found = []
    for state in states:
        bucket.objects = dict(state)
        finished = checkpoint.steps(RUN)
        for step in finished:
            checkpoint.verify(RUN, step)
        found.append(finished[-1])
    assert found == sorted(found) and len(states) > 30
    assert [found.count(step) > 10 for step in (1, 2)] == [True, True]
    half, deleting = states[found.index(2) // 2], states[-4]
    for state, step in ((half, 2), (deleting, 3)):  # what is left is swept, and a save goes on
        bucket.objects = dict(state)
        assert len(steps_in(bucket)) == 2 and checkpoint.steps(RUN) == [step - 1]
        save(step)
        assert steps_in(bucket) == {str(step - 1), str(step)}
        checkpoint.verify(RUN, step)


@pytest.mark.parametrize("refused", [("POST", "/2/weights/.*/d/"), ("PUT", "/2/config/metadata"),
                                     ("POST", "/2/checksums.json")])  # fmt: skip
def test_an_upload_that_fails_ends_the_save_and_leaves_nothing(bucket, refused):
    save(1)
    bucket.refused[refused] = 403
    with pytest.raises(CheckpointError, match=f"could not save {RUN}/checkpoints/2: ") as info:
        save(2, size=10_000)
    assert "\n" not in str(info.value)
    assert steps_in(bucket) == {"1"}
    bucket.refused.clear()
    save(2)
    assert checkpoint.newest_whole(RUN) == 2


def test_what_a_person_put_into_a_step_outlives_it(bucket):
    save(1)
    bucket.objects["runs/a/checkpoints/1/weights/d/notes.txt"] = b"mine"
    with pytest.warns(UserWarning, match="moved files that jdm has not written to .*1.kept"):
        save(2, keep=1)
    assert bucket.objects["runs/a/checkpoints/1.kept/weights/d/notes.txt"] == b"mine"
    assert steps_in(bucket) == {"1.kept", "2"}


PROCESSES = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jdm import checkpoint

address, rank, workdir = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
values = np.arange(48, dtype=np.float32).reshape(8, 6)
make = lambda: jax.make_array_from_callback(
    (8, 6), NamedSharding(mesh, P("data")), lambda index: values[index])
for step in (1, 2):
    checkpoint.save(workdir, step, weights={"w": make()}, config={}, keep=1)
    assert checkpoint.newest_whole(workdir) == step
got = checkpoint.restore(workdir, 2, weights={"w": make()})["weights"]["w"]
assert all((np.asarray(s.data) == values[s.index]).all() for s in got.addressable_shards)
jax.distributed.shutdown()
"""


def test_each_process_writes_its_part(bucket, two_processes):
    for done in two_processes(PROCESSES, RUN):
        assert done.returncode == 0, done.stderr
    assert steps_in(bucket) == {"2"}
    for process in (0, 1):
        assert any(f"/2/weights/ocdbt.process_{process}/d/" in name for name in bucket.objects)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"w": jax.ShapeDtypeStruct((8, 6), np.float32, sharding=sharding)}
    got = checkpoint.restore(RUN, 2, weights=target)["weights"]["w"]
    np.testing.assert_array_equal(got, np.arange(48, dtype=np.float32).reshape(8, 6))


# --- metrics --------------------------------------------------------------------------------------


def test_rows_are_there_at_each_sync_and_a_bucket_that_is_away_costs_no_run(bucket, monkeypatch):
    with MetricLog(RUN, 0, time.monotonic()) as log:
        log.write(1, 16, {"train/loss": 0.5})
        assert not bucket.objects  # nothing is written for each row
        log.sync()
        assert [row["step"] for row in read_metrics(RUN)] == [1]
        assert any(name.startswith("runs/a/events.out.tfevents") for name in bucket.objects)
        monkeypatch.setattr(storage.Bucket, "sync_every", 0.0)
        bucket.refused["POST", ""] = 403
        with pytest.warns(UserWarning, match="the last rows of metrics are not saved yet: gs://"):
            log.write(2, 32, {"train/loss": 0.25})
        with pytest.raises(BucketError):  # before a checkpoint they must be
            log.sync()
        bucket.refused.clear()
        log.write(3, 48, {"train/loss": 0.125})
        assert [row["step"] for row in read_metrics(RUN)] == [1, 2, 3]


# --- one job at a time ----------------------------------------------------------------------------

NAME = f"runs/a/{LOCK}"
OTHER = b"process 7 on other, since 2026-01-01\nanother-machine 7\n"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.5)


def only_job():
    return storage_of(RUN).only_job(storage.epath.Path(RUN))


def test_a_job_that_runs_keeps_others_out(bucket, quick, monkeypatch):
    with only_job() as check:
        holder = bucket.objects[NAME].decode().splitlines()[0]
        assert re.fullmatch(rf"process {os.getpid()} on \S+, since .*", holder)
        monkeypatch.setattr(lease, "_machine", lambda: "another-machine")
        with pytest.raises(InvalidValue, match=re.escape(f"in use by another job ({holder}); ch")):
            with only_job():
                pass
        check()
    assert not bucket.objects  # a job that ends leaves nothing to wait for


@pytest.mark.parametrize("ends", ["killed", "deleted"])
def test_a_job_that_has_ended_is_waited_for_once(bucket, quick, capsys, ends):
    bucket.objects[NAME] = OTHER
    if ends == "deleted":  # while it is waited for
        asked = []
        bucket.before = lambda method, name: (
            asked.append(1) or len(asked) == 2 and bucket.objects.pop(name)
        )
    began = time.monotonic()
    with only_job() as check:
        assert (time.monotonic() - began >= lease.STALE) == (ends == "killed")
        assert f"process {os.getpid()} on " in bucket.objects[NAME].decode()
        check()
    assert "was held by process 7 on other, since 2026-01-01; waiting 0.5 s" in (
        capsys.readouterr().out
    )


def test_a_dead_process_of_this_machine_is_not_waited_for(bucket, capsys):
    dead = subprocess.Popen(["true"])
    dead.wait()
    bucket.objects[NAME] = f"process 1 on x, since y\n{lease._machine()} {dead.pid}\n".encode()
    with only_job():
        assert capsys.readouterr().out == ""


def test_a_job_that_was_suspended_learns_that_another_has_taken_over(bucket):
    with pytest.raises(
        Failure, match=r"another job \(process 7 on other.*has taken over gs://buck"
    ):
        with only_job() as check:
            bucket.put(NAME, OTHER, {})
            check()
    assert bucket.objects == {NAME: OTHER}  # it is not deleted


def test_a_run_asks_before_each_save_whether_another_job_has_taken_over(bucket, monkeypatch):
    def take_over(method, name):
        if name.endswith("/1/checksums.json") and method == "POST":
            bucket.put(NAME, OTHER, {})

    bucket.before = take_over
    step = lambda state, batch, root: (state, {"loss": (np.float32(1), np.float32(1))})  # noqa: E731
    monkeypatch.setattr(trainer, "compile_step", lambda *args: step)
    with pytest.raises(Failure, match="has taken over"):
        trainer.train(load_config("tiny", SMALL), RUN)
    assert steps_in(bucket) == {"1"} and bucket.objects[NAME] == OTHER


def test_an_answer_that_was_lost_is_not_another_job(bucket, quick):
    with only_job() as check:
        bucket.put(NAME, bucket.objects[NAME], {})  # as if written, but with another generation
        time.sleep(0.3)
        check()
    assert not bucket.objects


def test_the_lock_and_metrics_of_a_disk(tmp_path, monkeypatch):
    """What buckets need is nothing to a disk; but a mounted bucket gets rows by fsync alone."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    with MetricLog(tmp_path, 0, time.monotonic()) as log:
        log.write(1, 16, {"train/loss": 0.5})
        assert [row["step"] for row in read_metrics(tmp_path)] == [1] and synced == []
        log.sync()
    assert str(tmp_path / "metrics.jsonl") in synced
    shutil.rmtree(tmp_path)
    assert json.dumps(read_metrics(tmp_path)) == "[]"
