"""What a run reports while it runs: a progress bar, metrics.jsonl and TensorBoard events.

Owns the files of metrics in a work folder. Computes no metrics.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from jdm.files import write_whole
from jdm.messages import STDERR

METRICS = "metrics.jsonl"


class Progress(contextlib.AbstractContextManager):
    """A progress bar with rate and time left; without a terminal, a line each `every` seconds.

    total, done: the count at the end and at the start. unit: of the counts, in the plural.
    """

    def __init__(self, total: int, label: str, unit: str, done: int = 0, every: float = 10.0):
        shown = dict(total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True)
        self._bar = tqdm(**shown, file=STDERR, disable=not STDERR.isatty(), delay=2)
        self._label, self._unit, self._total = label, unit, total
        self._done = self._first = done
        self._started = self._printed = time.monotonic()
        self._every = every

    def __exit__(self, *_):
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= self._every:
            rate = (self._done - self._first) / (now - self._started)
            left = (self._total - self._done) / rate
            self._printed = now
            counts = f"{self._label}: {self._done}/{self._total} {self._unit}"
            self.say(f"{counts}, {rate:.3g} {self._unit}/s, {left:.0f} s left")

    def say(self, line: str) -> None:
        """Prints a line to stderr; above the bar, where there is one."""
        self._bar.write(line, file=STDERR)
        STDERR.flush()


class MetricLog(contextlib.AbstractContextManager):
    """metrics.jsonl and the TensorBoard events of a work folder; one row for each logged step.

    step: the step that the run resumes from. Later rows, of an interrupted run, are removed: these
    steps are run and logged again. started: time.monotonic() at the start of the run.
    """

    def __init__(self, workdir: str | os.PathLike, step: int, started: float):
        path = Path(workdir) / METRICS
        rows = [row for row in read_metrics(workdir) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._before = rows[-1]["seconds"] if rows else 0.0
        self._started = started
        self._file = path.open("a")
        self._events = _summary_writer()(str(workdir), purge_step=step + 1)

    def __exit__(self, *_):
        self._file.close()
        self._events.close()

    def write(self, step: int, images: int, metrics: dict[str, float | int]) -> None:
        """Adds a row: step, images seen, seconds of training in all its runs, and the metrics."""
        seconds = round(self._before + time.monotonic() - self._started, 3)
        row = {"step": step, "images": images, "seconds": seconds, **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


def _summary_writer() -> type:
    """tensorboardX's SummaryWriter. PyTorch, which it imports where it can, is hidden from it: it
    takes seconds to import, and scalars do not need it."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # importing it fails
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | int]]:
    """The rows of a work folder's metrics.jsonl; [] where there is none.

    An incomplete last line, left by a full disk or a killed run, is skipped.
    """
    path = Path(workdir) / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
