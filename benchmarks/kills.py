"""Ends a small training run at random moments, starts it again each time, and compares what it ends
with to a run that nothing disturbed.

    python benchmarks/kills.py --moments=20 --processes=2
    python benchmarks/kills.py --moments=20 --signals TERM

With several processes one of them, chosen at random, gets the signal. Checked at each moment: every
step with a final name is whole, and no step is lost: none after SIGTERM in the steps, those since
the last checkpoint after SIGKILL. Checked when the run has ended: every array of its last
checkpoint is that of the undisturbed run, bit by bit. Then it begins again, until `--moments` have
passed. Exits with 1 where a check fails.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

EVERY = 4  # steps between two checkpoints
STARTING = 0.2  # the share of the moments that are in the start of the run
CONFIG = [
    "--config.model.multipliers=(1,)",
    "--config.model.attention=()",
    "--config.model.blocks=1",
    "--config.model.channels=4",
    f"--config.checkpoint.every={EVERY}",
    "--config.checkpoint.keep=2",
    "--config.eval.every=10",
]


class Run:
    """The command jdm train in a folder, in processes that are forked from this one: importing JAX
    takes longer than the run. So this process must not use JAX itself."""

    def __init__(self, workdir: Path, processes: int, steps: int):
        self.workdir, self.steps, self.started = workdir, steps, time.monotonic()
        self._written = time.time()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self._port = free.getsockname()[1]
        self.processes = [self._fork(index, processes) for index in range(processes)]

    def _fork(self, index: int, processes: int) -> int:
        if process := os.fork():
            return process
        where = [f"--coordinator=127.0.0.1:{self._port}", f"--processes={processes}"]
        flags = [*where, f"--process={index}", "--timeout=60"] if processes > 1 else []
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
        )
        log = os.open(f"{self.workdir}.{index}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from jdm.cli import main

        try:
            steps = f"--config.train.steps={self.steps}"
            main(["train", "--config=tiny", *CONFIG, steps, f"--workdir={self.workdir}", *flags])
            status = 0
        except SystemExit as ending:
            status = int(ending.code or 0)
        sys.stdout.flush()
        os._exit(status)

    def reached(self, step: int) -> float:
        """Waits for the row of a step; returns the seconds since the start. Gives up after 120."""
        rows = (
            self.workdir / "metrics.jsonl"
        )  # those of another run are there until this one writes
        while not (rows.exists() and rows.stat().st_mtime > self._written) or (
            last_row(self.workdir) < step
        ):
            if time.monotonic() > self.started + 120:
                break
            time.sleep(0.005)
        return time.monotonic() - self.started

    def wait(self) -> list[int]:
        """The statuses of the processes; that of one that a signal has ended is negative."""
        waited = [os.waitpid(process, 0)[1] for process in self.processes]
        return [os.waitstatus_to_exitcode(status) for status in waited]


def check(holds: bool, said: str) -> None:
    if not holds:
        sys.exit(f"kills.py: {said}")


def last_row(workdir: Path) -> int:
    """The last step in metrics.jsonl; the config logs every step."""
    from jdm.tracking import read_metrics

    return max((row["step"] for row in read_metrics(workdir)), default=0)


def check_same(ours: Path, theirs: Path, step: int) -> None:
    """Compares the arrays of a step, and the position in the data, in another process."""
    if not (process := os.fork()):
        import jax
        import numpy as np

        from jdm import checkpoint, trainer
        from jdm.config import load_config

        run = trainer.prepare(load_config("tiny", CONFIG), trainer.make_mesh())
        trees = trainer.trees_of(run.state)
        a, b = (checkpoint.restore(workdir, step, **trees) for workdir in (ours, theirs))
        differ = [
            jax.tree_util.keystr(path)
            for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
            if not np.array_equal(x, y)
        ]
        print(f"{len(differ)} of {len(jax.tree.leaves(a))} arrays differ {differ[:3]}", flush=True)
        data = [checkpoint.read_data(workdir, step) for workdir in (ours, theirs)]
        os._exit(bool(differ) or data[0] != data[1])
    check(os.waitpid(process, 0)[1] == 0, "the run has ended with other weights")


def disturbed(
    folder: Path, *, moments: int, processes: int, steps: int, signals: Sequence[str], seed: int
) -> None:
    """Does what this file is for, in a new folder."""
    from jdm import checkpoint

    draw, straight, workdir = random.Random(seed), folder / "straight", folder / "disturbed"
    run = Run(straight, processes, steps)
    began = run.reached(1)
    check(run.wait() == [0] * processes, f"the undisturbed run failed, see {folder}")
    pause = (time.monotonic() - run.started - began) / steps * 2  # that of a step, with its saving
    passed = 0
    while True:
        first, saved = last_row(workdir), max(checkpoint.steps(workdir), default=0)
        run = Run(workdir, processes, steps)
        if passed == moments:
            check(run.wait() == [0] * processes, f"a run that was resumed failed, see {folder}")
            check_same(workdir, straight, steps)
            return
        number = signal.Signals[f"SIG{signals[passed % len(signals)]}"]
        if draw.random() < STARTING:
            time.sleep(draw.uniform(0, began))
        else:
            run.reached(draw.randint(min(saved + 1, steps), steps))
            time.sleep(draw.uniform(0, pause))
        before = last_row(workdir)
        os.kill(draw.choice(run.processes), number)  # a process that has ended is waited for below
        statuses = run.wait()
        whole = checkpoint.steps(workdir)
        for step in whole:
            checkpoint.verify(workdir, step)
        saved, row = max(whole, default=0), last_row(workdir)
        moment = (
            f"{number.name} {time.monotonic() - run.started:.1f} s after the start, step {before}"
        )
        print(f"{moment}: status {statuses}, checkpoint {saved}", flush=True)
        if statuses == [0] * processes:  # it had ended before
            check_same(workdir, straight, steps)
            shutil.rmtree(workdir)
            continue
        lost = row - saved
        if number == signal.SIGTERM:
            check(set(statuses) <= {143, -signal.SIGTERM}, "the status is not 143")
            check(lost == 0 or row == first, f"{lost} steps are lost")
        check(lost <= EVERY, f"{lost} steps are lost")
        passed += 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--moments", type=int, default=20, help="how often the run is ended")
    parser.add_argument("--processes", type=int, default=1, help="of the run")
    parser.add_argument("--steps", type=int, default=60, help="of the run")
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=("KILL", "TERM"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(argv)
    import grain  # noqa: F401  these are imported once, before the first fork
    import tensorboardX  # noqa: F401

    import jdm.trainer  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    disturbed(folder, **vars(given))
    print(f"moments: {given.moments}; each step whole, and the same at the end")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
