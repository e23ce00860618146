"""What a run says while it goes: a progress bar, metrics.jsonl, TensorBoard.

Owns the files of figures in a work folder. Computes none of them.
"""

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from jdm.files import write_whole


class Progress:
    """A bar with rate and time left; plain lines, seconds apart, where there is no terminal."""

    def __init__(self, total: int, what: str, unit: str, done: int = 0, every: float = 10.0):
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            delay=2,
        )
        self._what, self._unit, self._total = what, unit, total
        self._done = self._first = done
        self._started = self._said = time.monotonic()
        self._every = every

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= self._every:
            rate = (self._done - self._first) / (now - self._started)
            left = (self._total - self._done) / rate
            self._said = now
            self.say(
                f"{self._what}: {self._done}/{self._total} {self._unit}, "
                f"{rate:.3g} {self._unit}/s, {left:.0f} s left"
            )

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        self._bar.write(line, file=sys.stderr)


class MetricLog:
    """metrics.jsonl and TensorBoard events of a work folder, one row a step.

    step: where the run goes on. Rows beyond it, of a run that was cut off after its last
    checkpoint, are taken out, since they will be written again. started: time.monotonic() at the
    start of the run.
    """

    def __init__(self, workdir: str | os.PathLike, step: int, started: float):
        from tensorboardX import SummaryWriter

        rows = [row for row in read_metrics(workdir) if row["step"] <= step]
        path = _metrics_path(workdir)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._before = rows[-1]["seconds"] if rows else 0.0
        self._started = started
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir), purge_step=step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._events.close()

    def write(self, step: int, images: int, metrics: dict[str, float | int]) -> None:
        """One row: step, images seen, seconds in training over all starts, and the metrics."""
        seconds = round(self._before + time.monotonic() - self._started, 3)
        row = {"step": step, "images": images, "seconds": seconds, **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


def _metrics_path(workdir: str | os.PathLike) -> Path:
    return Path(workdir) / "metrics.jsonl"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | int]]:
    """The rows of a work folder's metrics.jsonl; [] where there is none.

    A last line that was cut off, by a full disk or a kill, is left out.
    """
    path = _metrics_path(workdir)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
