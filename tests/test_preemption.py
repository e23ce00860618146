"""SIGTERM during training: a checkpoint at a common step, and the same run from there."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jdm import checkpoint, distributed, preemption, trainer
from jdm.analysis.evaluators import EVALUATORS
from jdm.config import load_config
from jdm.distributed import Preempted
from jdm.tracking import read_metrics

JDM = Path(sys.executable).with_name("jdm")
SMALL = ("model.channels=4", "model.multipliers=(1,)", "model.attention=()")


def config_of(*changes):
    return load_config("tiny", [f"--config.{change}" for change in (*SMALL, *changes)])


def terminate() -> None:
    """SIGTERM to this process, and a moment for the thread that waits for it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)


@pytest.fixture
def stepped(monkeypatch):
    """Steps take no time and change only their number; stepped(step) is called before each."""
    prepared, before = trainer.prepare(config_of(), trainer.make_mesh()), []

    def step(state, batch, root):
        for call in before:
            call(int(state.step) + 1)
        return state.replace(step=state.step + 1), {"loss": (np.float32(1), np.float32(1))}

    monkeypatch.setattr(trainer, "prepare", lambda *args: prepared)
    monkeypatch.setattr(trainer, "compile_step", lambda *args: step)
    return before.append


def evaluator(monkeypatch, during=lambda step: None):
    def scripted(joint, split, options):
        during(joint.step)
        yield "accuracy", float(joint.step)

    monkeypatch.setitem(EVALUATORS, "classification", lambda *args: scripted(*args))


KILLED = """
import os, signal, sys

from jdm import startup, trainer
from jdm.config import load_config

startup.collect_rarely()

def kill(row):  # the checkpoint of this step is not begun
    if row["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.train(load_config("tiny", ["--config.checkpoint.every=3"]), sys.argv[1], on_row=kill)
"""


def test_a_run_goes_on_bitwise_after_sigterm_and_after_a_kill(tiny, tmp_path):
    """At many moments, and in two processes: benchmarks/kills.py."""
    config, workdir = load_config("tiny", ["--config.checkpoint.every=0"]), tmp_path / "run"

    def end(row):
        if row["step"] == 2:
            terminate()

    with pytest.raises(Preempted, match="ended the run after step 3 of 4, which is saved"):
        trainer.train(config, workdir, on_row=end)
    assert checkpoint.steps(workdir) == [3]
    killed = subprocess.run([sys.executable, "-c", KILLED, workdir], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.steps(workdir) == [3]
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3, 4]
    trainer.train(config, workdir)
    trees = trainer.trees_of(trainer.prepare(config, trainer.make_mesh()).state)
    found = [checkpoint.restore(folder, 4, **trees) for folder in (workdir, tiny)]
    assert len(jax.tree.leaves(found[0])) > 100
    jax.tree.map(np.testing.assert_array_equal, *found)
    rows = [[row["train/loss"] for row in read_metrics(folder)] for folder in (workdir, tiny)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_an_evaluation_goes_on_to_its_end(tmp_path, monkeypatch, stepped):
    evaluator(monkeypatch, lambda step: terminate() if step == 4 else None)
    config = config_of("train.steps=8", "log.every=0", "eval.every=2", "checkpoint.every=0")
    with pytest.raises(Preempted, match="after step 4 of 8"):
        trainer.train(config, tmp_path)
    assert checkpoint.steps(tmp_path) == [4]
    assert [row["eval/accuracy"] for row in read_metrics(tmp_path)] == [2, 4]


def test_steps_without_a_row_get_one(tmp_path, monkeypatch, stepped):
    evaluator(monkeypatch)
    stepped(lambda step: terminate() if step == 5 else None)
    with pytest.raises(Preempted):
        trainer.train(config_of("train.steps=9", "log.every=3", "eval.every=0"), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 3, 4, 5]  # 2, 4: saved


def test_a_run_that_has_ended_is_no_failure(tmp_path, monkeypatch, stepped):
    evaluator(monkeypatch, lambda step: terminate() if step == 3 else None)
    trainer.train(config_of("train.steps=3", "eval.every=0"), tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_second_signal_and_one_before_the_steps_end_the_process(monkeypatch):
    left = []
    monkeypatch.setattr(distributed, "leave", lambda *args: left.append(args))
    with preemption.watched() as notice:
        terminate()
        assert left == [("ended by SIGTERM, before the first step", 143)]
        notice.begin()
        assert not notice.reached(1)
        terminate()
        assert notice.reached(2) and len(left) == 1
        terminate()
        assert left[1:] == [("ended by a second SIGTERM", 143)]


def test_what_was_there_before_is_restored():
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append("handler"))
    # A shell without job control lets what it starts in the background ignore SIGINT.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    wakeup = signal.set_wakeup_fd(theirs)
    try:
        with pytest.raises(KeyboardInterrupt), preemption.watched() as notice:
            notice.begin()
            terminate()
            assert notice.reached(1) and arrived == []
            assert os.read(ours, 9) == bytes([signal.SIGTERM])  # it hears of signals all the same
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        os.read(ours, 9)
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrived == ["handler"] and os.read(ours, 9) == bytes([signal.SIGTERM])
        assert "jdm-sigterm" not in [thread.name for thread in threading.enumerate()]
    finally:
        assert signal.set_wakeup_fd(wakeup) == theirs
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
        os.close(ours)
        os.close(theirs)


def test_training_in_a_thread_leaves_signals_alone(tmp_path, monkeypatch, stepped):
    evaluator(monkeypatch)
    handlers = []
    stepped(lambda step: handlers.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=trainer.train, args=(config_of("train.steps=3"), tmp_path))
    thread.start()
    thread.join(60)
    assert checkpoint.steps(tmp_path) == [2, 3] and handlers == [before] * 3


def test_sigterm_ends_a_compilation_at_once(tmp_path):
    command = [JDM, "train", "--config=digits", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, **pipes)
    while "compiling" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    time.sleep(3)  # of tracing; XLA takes longer
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "compiled" not in out and process.returncode == 143
    assert err.splitlines()[-1] == "jdm: ended by SIGTERM, before the first step"
    assert not (tmp_path / "run" / "checkpoints").exists()


PROCESSES = """
import os, signal, sys
from pathlib import Path

import numpy as np

from jdm import checkpoint, distributed, trainer
from jdm.analysis.evaluators import EVALUATORS
from jdm.config import load_config
from jdm.distributed import Preempted, Processes, joined

address, index, folder, *changes = sys.argv[1:]
processes, folder = Processes(coordinator=address, processes=2, process=int(index)), Path(folder)

def config_of(steps):
    return load_config("tiny", [*changes, f"--config.train.steps={steps}"])

def step(state, batch, root):  # waits for the other process, and changes only its number
    distributed.barrier("step")
    return state.replace(step=state.step + 1), {"loss": (np.float32(1), np.float32(1))}

def end(row):  # called in process 0
    if row["step"] == 2:
        os.kill(int((folder / "process").read_text()), signal.SIGTERM)

trainer.compile_step = lambda *args: step
EVALUATORS["classification"] = lambda *args: iter([("accuracy", 1.0)])
if processes.process == 1:
    (folder / "process").write_text(str(os.getpid()))
try:
    with joined(processes, {}):
        try:
            trainer.train(config_of(100_000), folder / "run", on_row=end)
        except Preempted as error:
            ended = error
        (saved,) = checkpoint.steps(folder / "run")
        assert f"after step {saved} of 100000" in str(ended) and saved > 2
        trainer.train(config_of(saved + 2), folder / "run")
        raise ended
except Preempted as error:
    sys.exit(error.status)
"""


def test_two_processes_stop_at_one_step_and_go_on(tmp_path, two_processes):
    """To the same weights: benchmarks/kills.py --processes=2."""
    changes = (*SMALL, "log.every=1", "eval.every=0", "checkpoint.every=0")
    ended = two_processes(PROCESSES, tmp_path, *(f"--config.{change}" for change in changes))
    assert [process.returncode for process in ended] == [143, 143], ended
    assert "SIGTERM: a checkpoint is saved after this step" in ended[1].stderr
    before, last = checkpoint.steps(tmp_path / "run")
    assert last == before + 2
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, last + 1))
