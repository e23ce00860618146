"""`jdm train` in several processes: they meet, agree, train as one would, and end together."""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jdm import checkpoint, connections, trainer
from jdm.config import load_config
from jdm.connections import Links
from jdm.errors import InvalidValue
from jdm.files import one_at_a_time
from jdm.joint import load
from jdm.tracking import read_metrics

JDM = Path(sys.executable).with_name("jdm")
CONFIG = [
    "--config.model.multipliers=(1,)",
    "--config.model.attention=()",
    "--config.train.steps=5",
    "--config.checkpoint.every=3",
    "--config.eval.every=3",
]


def by_hand(port: int, index: int, timeout: int = 120) -> list[str]:
    where = f"--coordinator=127.0.0.1:{port}"
    return [where, "--processes=2", f"--process={index}", f"--timeout={timeout}"]


def start(workdir, *flags, **environment) -> subprocess.Popen:
    """`jdm train` of CONFIG, in a process with two devices."""
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    return subprocess.Popen(
        [JDM, "train", "--config=tiny", f"--workdir={workdir}", *CONFIG, *flags],
        env={**os.environ, "XLA_FLAGS": devices, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes) -> list[tuple[int, str, list[str]]]:
    """(status, stdout, lines of stderr) of each process."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        found.append((process.returncode, out, [x for x in err.splitlines() if "Gloo" not in x]))
    return found


def losses(workdir) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir)}


@pytest.fixture(scope="module")
def two(tmp_path_factory, free_port):
    """The work folder of a run of two processes, of which process 1 was killed after step 5, and
    how they ended."""
    workdir, port = tmp_path_factory.mktemp("two") / "run", free_port()
    more = ("--config.train.steps=1000000", "--config.checkpoint.keep=1000000")
    zero, other = [start(workdir, *by_hand(port, i), *more) for i in range(2)]
    while not workdir.exists() or last_step(workdir) < 5:
        assert zero.poll() is None and other.poll() is None, finish([zero, other])
        time.sleep(0.02)
    other.send_signal(signal.SIGKILL)
    return workdir, finish([zero, other])


def last_step(workdir) -> int:
    return max((row["step"] for row in read_metrics(workdir)), default=0)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The work folder of the same run in one process, on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    trainer.train(load_config("tiny", CONFIG), workdir)
    return workdir


def test_two_processes_train_as_one(two, one):
    workdir, _ = two
    expected, found = losses(one), losses(workdir)
    assert list(expected) == list(found)[:5] == [1, 2, 3, 4, 5]
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5)
    for ours, theirs in zip(
        *(jax.tree.leaves(load(w, 3).weights) for w in (workdir, one)), strict=True
    ):
        # Adam moves a bias whose gradient is rounding errors alone: by 1e-3 a step, at most.
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    evaluated = [read_metrics(w)[2]["eval/cross_entropy"] for w in (workdir, one)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-4)


def test_process_0_alone_writes_and_reports(two, one):
    workdir, ((_, out, lines), (_, other, nothing)) = two
    assert "2 processes are connected: 0 on " in out
    assert "4 devices" in out and any("step 5" in line for line in lines)
    assert nothing == [] and "training" not in other
    names = [sorted(path.name.partition(".out")[0] for path in w.iterdir()) for w in (workdir, one)]
    assert names[0] == names[1]
    found = list(losses(workdir))
    assert found == list(range(1, len(found) + 1))  # each row once
    checkpoint.verify(workdir, 3)


def test_a_process_that_is_killed_ends_the_other(two):
    _, ((status, _, lines), (killed, _, _)) = two
    assert (status, killed) == (1, -signal.SIGKILL)
    (said,) = [line for line in lines if not line.startswith(("step ", "training: ", "  "))]
    host = socket.gethostname()
    assert said == f"jdm: process 1 of 2 (host {host}) has ended; its own output says why"


def test_one_process_resumes_what_two_began(two, tmp_path):
    workdir, expected = two[0], losses(two[0])
    for step in checkpoint.steps(workdir):
        if step > 3:
            shutil.move(workdir / "checkpoints" / str(step), tmp_path / str(step))
    trainer.train(load_config("tiny", CONFIG), workdir)
    assert list(losses(workdir)) == [1, 2, 3, 4, 5]
    for step, loss in losses(workdir).items():
        assert loss == pytest.approx(expected[step], abs=1e-5)


def test_other_configs_are_refused_in_both_processes(tmp_path, free_port):
    port, workdir = free_port(), tmp_path / "run"
    ended = finish(
        [start(workdir, *by_hand(port, i), f"--config.optim.lr=0.00{i + 1}") for i in range(2)]
    )
    host = socket.gethostname()
    said = f"process 1 of 2 (host {host}) differs from process 0 (host {host}): "
    said = f"jdm train: {said}config.optim.lr=0.002 instead of 0.001"
    assert [(status, lines) for status, _, lines in ended] == [
        (2, [said]),
        (2, [f"process 1 of 2: {said}"]),
    ]
    assert not workdir.exists()


def under_slurm(workdir, port, *flags) -> list[tuple[int, str, list[str]]]:
    """How two processes end that find each other by SLURM's variables; `{}` in a flag is the number
    of the process."""
    found = dict(SLURM_JOB_ID="1", SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2")
    found |= dict(JAX_COORDINATOR_PORT=str(port))
    each = [found | dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    numbered = [[flag.format(i) for flag in ("--distributed", *flags)] for i in range(2)]
    return finish([start(workdir, *numbered[i], **each[i]) for i in range(2)])


def test_a_cluster_that_jax_finds(one, free_port):
    (status, out, _), (other, silent, lines) = under_slurm(one, free_port())
    assert (status, other, lines) == (0, 0, [])
    assert "is trained already: 5 of 5 steps" in out and "trained" not in silent


def test_other_configs_are_refused_on_a_cluster(tmp_path, free_port):
    workdir = tmp_path / "run"
    for status, _, lines in under_slurm(workdir, free_port(), "--config.seed={}"):
        assert status == 2
        assert lines[-1].endswith("config.seed=1 instead of 0") and "jdm train: " in lines[-1]
    assert not workdir.exists()


def test_a_process_that_does_not_come_is_named(run, tmp_path, monkeypatch, free_port):
    monkeypatch.setattr(connections, "EVERY", 0.3)
    port = free_port()
    train = ["train", "--config=tiny", f"--workdir={tmp_path / 'run'}"]
    done = run(*train, *by_hand(port, 0, timeout=1))
    *waiting, said = done.stderr.splitlines()
    assert done.returncode == 2
    where = f"127.0.0.1:{port}"
    assert said == f"jdm train: process 1 of 2 has not connected to {where} within 1 s"
    assert waiting and "1 of 2 processes are there; missing: 1" in waiting[0]


def test_a_coordinator_that_cannot_be_reached_is_named(run, tmp_path, monkeypatch, free_port):
    said = []
    monkeypatch.setattr("jdm.distributed.only_alerts", said.append)  # for the whole process
    port = free_port()
    train = ["train", "--config=tiny", f"--workdir={tmp_path / 'run'}"]
    done = run(*train, *by_hand(port, 1, timeout=1))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    where = f"--coordinator='127.0.0.1:{port}'"
    assert f"{where} cannot be reached within 1 s: Connection refused" in done.stderr
    assert said == ["process 1 of 2"]


def test_a_port_in_use_is_named(run, tmp_path):
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        train = ["train", "--config=tiny", f"--workdir={tmp_path / 'run'}"]
        done = run(*train, *by_hand(port, 0))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be listened at: Address already in use" in done.stderr


GIVEN = ["--coordinator=a:8476", "--processes=2", "--process=1"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (GIVEN[:1], "--coordinator='a:8476' needs --processes and --process too"),
        (GIVEN[:2], "needs --process too"),
        (GIVEN[2:], "--process=1 needs --coordinator and --processes too"),
        ([*GIVEN[:2], "--process=2"], "--process=2 must be below --processes=2"),
        ([*GIVEN[:2], "--process=-1"], "--process=-1 must be 0 or more"),
        ([*GIVEN[:2], "--process=x"], "--process='x' must be a whole number"),
        ([*GIVEN[1:], "--coordinator=a:b"], "--coordinator='a:b' must be host:port"),
        ([*GIVEN[1:], "--coordinator=a"], "--coordinator='a' must be host:port"),
        ([*GIVEN[1:], "--coordinator=a:65536"], "port from 1 to 65535"),
        ([*GIVEN, "--timeout=0"], "--timeout=0 must be positive"),
        (["--timeout=5"], "--timeout=5 goes with --distributed or --coordinator"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sample", "eval"])
def test_flags_that_do_not_fit_are_one_sentence(run, tmp_path, command, flags, said):
    train = ["--config=tiny", f"--workdir={tmp_path}"]
    done = run(command, *(train if command == "train" else ["--checkpoint=digits"]), *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr


# --- connections alone, without JAX ---------------------------------------------------------------


def meet(port, facts, count=None, timeout=20.0, hold=None) -> list:
    """What each process of a run finds: its Links, or the error."""
    found: list = [None] * len(facts)

    def one(place, index, fact):
        links = Links(index, count or len(facts), ("127.0.0.1", port), timeout)
        try:
            links.meet(fact)
            found[place] = links
        except InvalidValue as error:
            found[place] = error

    pairs = enumerate(facts.items() if isinstance(facts, dict) else facts)
    threads = [threading.Thread(target=one, args=(n, i, fact)) for n, (i, fact) in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_what_is_no_process_is_ignored(free_port):
    port, junk = free_port(), []

    def disturb():
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[1]\n", b"[" * 100_000 + b"\n"):
            for _ in range(100):
                try:
                    junk.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                    junk[-1].sendall(content)
                    break
                except OSError:
                    time.sleep(0.02)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    late = threading.Timer(0.5, lambda: found.extend(meet(port, [(1, {"a": 1})], count=2)))
    found: list = []
    late.start()
    zero = Links(0, 2, ("127.0.0.1", port), 20.0)
    zero.meet({"a": 1})
    disturbing.join()
    late.join()
    assert isinstance(found[0], Links) and len(junk) == 4


def test_every_process_hears_which_differs(free_port):
    facts = [(0, {"a": 1, "b": 2}), (1, {"a": 1, "b": 2}), (2, {"a": 1, "b": 3})]
    found = {str(one) for one in meet(free_port(), facts)}
    assert len(found) == 1
    assert "process 2 of 3" in found.pop()


def test_a_number_that_two_processes_have_is_named(free_port):
    facts = [(0, {}), (1, {}), (1, {})]
    found = meet(free_port(), facts, count=3)
    assert all("process 1 is the number of two processes" in str(one) for one in found)


def test_devices_are_compared_and_an_end_is_told_to_all(free_port):
    zero, one, two = meet(free_port(), [(i, {}) for i in range(3)])
    found: queue.Queue = queue.Queue()

    def compare(links, devices):
        try:
            links.compare({"devices": devices}, "its devices")
        except InvalidValue as error:
            found.put(str(error))

    for devices in ("2 × cpu", "4 × cpu"):
        pairs = [(zero, "2 × cpu"), (one, "2 × cpu"), (two, devices)]
        threads = [threading.Thread(target=compare, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        said = {found.get(timeout=5) for _ in range(found.qsize())}
        assert (said == set()) == (devices == "2 × cpu")
    assert len(said) == 1 and "devices='4 × cpu' instead of '2 × cpu'" in said.pop()

    ended: queue.Queue = queue.Queue()
    for links in (zero, one):
        links.watch(lambda *told, links=links: ended.put((links.index, *told)))
    for link in two._links.values():
        link.socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed process
    told = sorted(ended.get(timeout=10) for _ in range(2))
    assert [index for index, _, _ in told] == [0, 1]
    assert all("process 2 of 3" in said and status == 1 for _, said, status in told)


def test_a_process_that_is_done_ends_nobody(free_port):
    zero, one = meet(free_port(), [(0, {}), (1, {})])
    ended: queue.Queue = queue.Queue()
    zero.watch(lambda *told: ended.put(told))
    one.tell({"done": True})
    for link in one._links.values():
        link.socket.close()
    with pytest.raises(queue.Empty):
        ended.get(timeout=0.5)


def test_two_processes_make_a_folder_once(tmp_path):
    made, waited = [], []

    def make():
        with one_at_a_time(tmp_path / "x", lambda: waited.append(len(made))):
            if not (tmp_path / "x").exists():
                while len(waited) < 2:
                    time.sleep(0.01)
                made.append((tmp_path / "x").mkdir())

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["x"]
    assert waited == [0, 0]


def test_a_lock_that_was_deleted_is_taken_anew(tmp_path):
    """Two wait for one, which deletes what they hold."""
    inside, most, waited = [], [], []

    def make():
        with one_at_a_time(tmp_path / "x", lambda: waited.append(1)):
            inside.append(1)
            while not waited:  # the first is still there when the second comes
                time.sleep(0.01)
            time.sleep(0.02)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_the_facts_of_a_run_are_ready_for_json(run, tmp_path, monkeypatch):
    """All flags and config values, with those that only one process has left out."""
    seen = {}
    monkeypatch.setattr(
        "jdm.distributed.Links.meet",
        lambda self, facts: (seen.update(facts), (_ for _ in ()).throw(InvalidValue("x", 1, "y"))),
    )
    run("train", "--config=tiny", f"--workdir={tmp_path}", *by_hand(1, 0))
    assert json.loads(json.dumps(seen))["config.optim.lr"] == 0.001
    assert {"workdir", "other-data", "processes", "timeout", "jdm", "jax"} <= seen.keys()
    assert not {"process", "coordinator", "config"} & seen.keys()
