"""What a run reports while it runs: a progress bar, metrics.jsonl and TensorBoard events.

Owns the files of metrics in a work folder. Computes no metrics.
"""

import contextlib
import contextvars
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from jdm import notebook
from jdm.messages import STDERR, STDOUT, say
from jdm.storage import BucketError, storage_of

METRICS = "metrics.jsonl"
REPLACED = "metrics.replaced.jsonl"
EVAL = "eval/"  # how the names of an evaluation's metrics begin

Watcher = Callable[[str, int, int], None]  # (label, done, total)
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Lets a function follow every Progress of this thread. What it raises ends the work, which is
    how a job is cancelled."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Progress(contextlib.AbstractContextManager):
    """A progress bar with rate and time left; without a terminal, a line each `every` seconds.

    total, done: the count at the end and at the start. unit: of the counts, in the plural.
    """

    def __init__(self, total: int, label: str, unit: str, done: int = 0, every: float = 10.0):
        shown: dict[str, Any] = dict(total=total, initial=done, desc=label, unit=f" {unit}")
        shown |= dict(dynamic_ncols=True, file=STDERR, disable=not STDERR.isatty(), delay=2)
        self._bar: Any
        if notebook.is_running():
            self._bar = notebook.Bar(total, done, label, unit)
        else:
            self._bar = tqdm(**shown)
        self._label, self._unit, self._total = label, unit, total
        self._done = self._first = done
        self._started = self._printed = time.monotonic()
        self._every = every

    def __exit__(self, *_):
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._done += count
        if watcher := _watcher.get():
            watcher(self._label, self._done, self._total)
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


def shown(step: int, row: Mapping[str, float], before: Mapping[str, float]) -> str:
    """A row of metrics for people: a line of the training's, and below it a small table of the
    evaluation's, with their values in the row `before`, where there is one."""
    line = "  ".join(f"{name} {row[name]:.4g}" for name in row if not name.startswith(EVAL))
    names = [name for name in row if name.startswith(EVAL)]
    columns = [["", *(name.removeprefix(EVAL) for name in names)]]
    for head, values in (("now", row), ("before", before)):
        if values:
            texts = [f"{values[name]:.4g}" if name in values else "" for name in names]
            columns.append([head, *texts])
    wide = [max(map(len, column)) for column in columns]
    lines = [f"step {step}  {line}"]
    for name, *numbers in zip(*columns, strict=True) if names else ():
        cells = [f"{number:>{w}}" for number, w in zip(numbers, wide[1:], strict=True)]
        lines.append("  ".join([f"  {name:<{wide[0]}}", *cells]).rstrip())
    return "\n".join(lines)


class MetricLog(contextlib.AbstractContextManager):
    """metrics.jsonl and the TensorBoard events of a work folder; one row for each logged step.

    step: the step that the run resumes from. Later rows, of an interrupted run, are moved to
    metrics.replaced.jsonl: these steps are run and logged again. Damaged lines are moved there too.
    started: time.monotonic() at the start of the run.
    """

    def __init__(self, workdir: epath.PathLike, step: int, started: float):
        folder, self._storage = epath.Path(workdir), storage_of(workdir)
        path, replaced = folder / METRICS, folder / REPLACED
        lines = _lines(path)
        kept = [(line, row) for line, row in lines if row is not None and row["step"] <= step]
        if moved := [line for line, row in lines if row is None or row["step"] > step]:
            with contextlib.closing(self._storage.lines(replaced)) as file:
                file.add(b"".join(line.rstrip(b"\n") + b"\n" for line in moved))
            self._storage.write(path, b"".join(line for line, _ in kept))
            rows = f"{len(moved)} row{'s' * (len(moved) > 1)} after step {step}, or damaged,"
            say(f"moved {rows} from {path} to {replaced}", STDOUT)
        self._before = kept[-1][1]["seconds"] if kept else 0.0
        self._started = self._synced = started
        self._file = self._storage.lines(path)
        self._mirror = contextlib.ExitStack()
        local, self._sync_events = self._mirror.enter_context(self._storage.mirrored(folder))
        self._events = _summary_writer()(local, purge_step=step + 1)

    def __exit__(self, kind, *_):
        with self._mirror:
            try:
                self._events.close()
                self._sync_events()
                self._file.close()
            except BucketError:
                if kind is None:  # else the run has ended with another error
                    raise

    def write(self, step: int, images: int, metrics: dict[str, float | int]) -> dict[str, Any]:
        """Adds a row, and returns it: step, images seen, seconds of training in all its runs, and
        the metrics."""
        seconds = round(self._before + time.monotonic() - self._started, 3)
        row = {"step": step, "images": images, "seconds": seconds, **metrics}
        self._file.add(json.dumps(row).encode() + b"\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        every = self._storage.sync_every
        if every is not None and time.monotonic() - self._synced >= every:
            try:
                self.sync()
            except BucketError as error:  # a checkpoint needs the rows before it, and tries again
                warnings.warn(f"the last rows of metrics are not saved yet: {error}", stacklevel=2)
        return row

    def sync(self) -> None:
        """Returns when all rows are where a kill, or the end of the machine, leaves them."""
        self._synced = time.monotonic()
        self._events.flush()
        self._sync_events()
        self._file.sync()


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


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float | int]]:
    """The rows of a work folder's metrics.jsonl; [] where there is none.

    Damaged lines, such as the last one after a full disk or a killed run, are skipped with a
    warning.
    """
    path = epath.Path(workdir) / METRICS
    rows = [row for _, row in _lines(path)]
    if damaged := [n for n, row in enumerate(rows, 1) if row is None]:
        lines = f"line{'s' * (len(damaged) > 1)} {', '.join(map(str, damaged[:10]))}"
        more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
        warnings.warn(f"{path}: skipped {lines}{more}, damaged", stacklevel=2)
    return [row for row in rows if row is not None]


def _lines(path: epath.Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(line, its row or None where it is damaged) of each line of a metrics.jsonl."""
    try:
        lines = storage_of(path).read(path).splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    return [(line, _row(line)) for line in lines]


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):  # also where what is there could be read: a number may go on
        return None
    try:
        row = json.loads(line)
        # What is read of a row; the rest may be of any version.
        return row if row["step"] + row["seconds"] >= 0 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
