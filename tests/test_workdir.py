"""A work folder as a training finds it: damaged, of another run, or in use. Nothing is trained."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from jdm import checkpoint, trainer
from jdm.config import load_config
from jdm.data.pipeline import TrainBatches
from jdm.data.splits import Split
from jdm.errors import InvalidValue
from jdm.files import LOCK, only_job


class Compiled(Exception):
    """The run came to its first step."""


@pytest.fixture(scope="module")
def prepared():
    return trainer.prepare(load_config("tiny"), trainer.make_mesh())


@pytest.fixture(autouse=True)
def stop(prepared, monkeypatch):
    """What is refused is refused before anything is compiled."""

    def compile_step(*args):
        raise Compiled

    monkeypatch.setattr(trainer, "compile_step", compile_step)
    # The same for every test; only its labels are looked at.
    split = Split(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32), "validation")
    monkeypatch.setattr(trainer, "prepare", lambda *args: prepared)
    monkeypatch.setattr(trainer, "read_data", lambda config: (mock.Mock(spec=TrainBatches), split))


@pytest.fixture
def workdir(tiny, tmp_path):
    """A copy of a run of 4 steps, with checkpoints of the steps 2 and 4."""
    return shutil.copytree(tiny, tmp_path / "w")


@pytest.fixture
def refused(run, workdir):
    """refused(*flags): the sentence that resuming with these flags is refused with."""

    def call(*flags, status=2):
        before = contents(workdir)
        done = run("train", "--config=tiny", f"--workdir={workdir}", *flags)
        assert done.returncode == status and done.stderr.count("\n") == 1
        assert {**contents(workdir), LOCK: 0} == {**before, LOCK: 0}  # nothing was lost or written
        return done.stderr

    return call


def contents(workdir):
    """{path: digest} of every file."""
    files = [path for path in workdir.rglob("*") if path.is_file()]
    return {str(p.relative_to(workdir)): hashlib.md5(p.read_bytes()).digest() for p in files}


def rewrite(workdir, step, item, change):
    """Changes what a JSON item of a checkpoint holds, and its checksum."""
    root = workdir / "checkpoints" / str(step)
    path, sums = root / item / "metadata", root / "checksums.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {f"{item}/metadata": digest}))


def damage(workdir):
    for step in checkpoint.steps(workdir):
        (workdir / "checkpoints" / str(step) / "weights" / "manifest.ocdbt").write_bytes(b"")


def test_a_run_that_has_lost_all_steps_does_not_start_again(workdir, refused):
    damage(workdir)
    said = refused(status=1)
    assert f"no checkpoint in {workdir / 'checkpoints'} is whole" in said
    assert "4/weights/manifest.ocdbt is damaged" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "config.json is damaged: it is empty"),
        (b'{"seed": ', "config.json is damaged: Expecting value"),
        ("{}".encode("utf-16")[:-1], "config.json is damaged: "),
        (b"[1]", "config.json is damaged: it holds no JSON object"),
        (b'{"model": 3}', "in config.json, config.model is unknown"),
        (b"{}", "in config.json, config.seed is missing from the stored config"),
        (b'{"version": 99}', "in config.json, config.version=99 is newer than"),
    ],
)
def test_a_damaged_config_is_one_sentence_that_names_it(workdir, refused, content, said):
    (workdir / "config.json").write_bytes(content)
    sentence = refused()
    assert f"--workdir={str(workdir)!r} cannot be used: " in sentence and said in sentence


def test_a_byte_order_mark_is_no_damage(workdir, run):
    path = workdir / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "trained already" in run("train", "--config=tiny", f"--workdir={workdir}").stdout


@pytest.mark.parametrize("held", [{"epoch": 1}, [1]])
def test_a_position_that_is_none_is_one_sentence(workdir, held):
    for step in (2, 4):
        rewrite(workdir, step, "data", lambda _: held)
    config = load_config("tiny", ["--config.train.steps=8"])
    said = re.escape(f"step 4 of {workdir} holds no position in the data: {held}")
    with pytest.raises(checkpoint.CheckpointError, match=said):
        trainer.train(config, workdir)


@pytest.mark.parametrize("beside", ["missing", "edited"])
def test_the_config_of_the_checkpoint_is_compared(workdir, refused, beside):
    path = workdir / "config.json"
    stored = json.loads(path.read_text())
    path.unlink()
    if beside == "edited":
        stored["optim"]["lr"], stored["loss"]["weight"], stored["seed"] = 0.5, 3.0, 9
        path.write_text(json.dumps(stored))
    changes = ("optim.lr=0.5", "loss.weight=3", "seed=9", "train.steps=8")
    said = refused(*(f"--config.{change}" for change in changes))
    assert all(change in said for change in ("lr: 0.001 -> 0.5", "weight: 0.1 -> 3.0", "0 -> 9"))
    assert "train.steps" not in said


def test_a_config_that_is_missing_is_written_again(workdir, run):
    (workdir / "config.json").unlink()
    damage_of_the_newest = workdir / "checkpoints" / "4" / "config" / "metadata"
    damage_of_the_newest.write_bytes(b"")
    with pytest.raises(Compiled):  # it goes on from step 2
        run("train", "--config=tiny", f"--workdir={workdir}")
    assert json.loads((workdir / "config.json").read_text()) == checkpoint.read_config(workdir, 2)


def test_a_second_job_is_told_who_holds_the_folder(workdir, refused):
    with only_job(workdir):
        holder = rf"process {os.getpid()} on \S+, since \d+-\d\d-\d\d \d\d:\d\d:\d\d\S*"
        said = refused("--config.train.steps=8")
    assert re.search(rf"w' is in use by another job \({holder}\); choose another folder\n$", said)


def test_a_job_that_was_killed_holds_nothing(tmp_path):
    code = "import pathlib, sys, time; from jdm.files import only_job\n"
    code += "with only_job(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as job:
        assert job.stdout.read(1)
        with pytest.raises(InvalidValue, match=f"process {job.pid} on "), only_job(tmp_path):
            pass
        job.send_signal(signal.SIGKILL)
    with only_job(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()


def test_one_process_of_a_job_holds_the_folder_for_all(tmp_path, monkeypatch):
    began, config = [], load_config("tiny")
    monkeypatch.setattr(trainer, "_train", lambda *args: began.append(jax.process_index()))
    with only_job(tmp_path):  # as process 0 of the job does
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        trainer.train(config, tmp_path)
        monkeypatch.setattr(jax, "process_index", lambda: 0)
        with pytest.raises(InvalidValue, match="in use"):
            trainer.train(config, tmp_path)
    trainer.train(config, tmp_path)
    assert began == [1, 0]


def test_another_number_of_steps_under_cosine_says_both_learning_rates(workdir, recwarn):
    def cosine(values):
        values["optim"]["schedule"] = "cosine"
        return values

    for step in (2, 4):
        rewrite(workdir, step, "config", cosine)
    (workdir / "config.json").unlink()
    flags = ["--config.optim.schedule=cosine", "--config.train.steps=8"]
    with pytest.raises(Compiled):
        trainer.train(load_config("tiny", flags), workdir)
    (said,) = [str(one.message) for one in recwarn if "learning rate" in str(one.message)]
    assert said == (
        "config.train.steps: 4 -> 8 changes the learning rate at step 4 from 0 to 0.0005: "
        "config.optim.schedule='cosine' ends at the last step"
    )


def test_another_number_of_steps_under_a_constant_rate_says_nothing(workdir, recwarn):
    with pytest.raises(Compiled):
        trainer.train(load_config("tiny", ["--config.train.steps=8"]), workdir)
    assert not [one for one in recwarn if "learning rate" in str(one.message)]
