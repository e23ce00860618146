"""What a notebook shows while a run goes on: a progress bar, and curves of the metrics.

Each is one output of a cell that is replaced in place. So they need no widgets, work in Jupyter,
Colab and editors alike, and stay in a saved notebook as they were last. IPython, which they need,
is there wherever there is a notebook.
"""

import html
import io
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

INTERVAL = 0.3  # seconds between two changes of a bar
COLOURS = {"train": "#1f5fbf", "eval": "#d6452b"}  # of the lines
HIDDEN = {"images_per_second"}  # metrics without a curve
COLUMNS = 3  # of the panels

Row = Mapping[str, float | int]
Panel = dict[str, list[tuple[float | int, float | int]]]  # {"train" or "eval": [(step, value)]}


def is_running() -> bool:
    """Whether this process runs the cells of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Output:
    """One output of a cell, which appears when it is first shown and is replaced from then on."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def visible(self) -> bool:
        """Whether it has appeared."""
        return self._handle is not None

    def show(self, content: Mapping[str, Any]) -> None:
        """content: {MIME type: data}, of which the notebook shows the best that it can."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(dict(content), raw=True, display_id=True)
        else:
            self._handle.update(dict(content), raw=True)


class Bar:
    """A progress bar with rate and time left; what `tracking.Progress` needs of a tqdm bar.

    total, initial: the count at the end and at the start. desc: what goes on. unit: of the counts.
    delay: seconds after which it appears, so that what is quick shows none.
    """

    disable = False

    def __init__(self, total: int, initial: int = 0, desc: str = "", unit: str = "", delay=2.0):
        self._total, self._initial, self._count = total, initial, initial
        self._desc, self._unit = desc, unit
        self._output = Output()
        self._started = time.monotonic()
        self._due = self._started + delay

    def update(self, count: int) -> None:
        """Counts `count` more."""
        self._count += count
        if time.monotonic() >= self._due:
            self._show()

    def close(self) -> None:
        """Shows the last state, where the bar has appeared."""
        if self._output.visible:
            self._show(closed=True)

    def write(self, line: str, file: Any = None) -> None:
        """Prints a line below the bar."""
        print(line, flush=True)

    def _show(self, closed: bool = False) -> None:
        now = time.monotonic()
        self._due, elapsed = now + INTERVAL, now - self._started
        rate = (self._count - self._initial) / max(elapsed, 1e-9)
        left = (self._total - self._count) / max(rate, 1e-9)
        times = [tqdm.format_interval(one) for one in (elapsed, left)]
        ending = f"in {times[0]}" if closed else f"{times[0]}, {times[1]} left"
        counts = f"{self._count:,} of {self._total:,} {self._unit}, {rate:.3g} {self._unit}/s"
        text = f"{self._desc}: {counts}, {ending}"
        bar = f'<progress value="{self._count}" max="{self._total}" style="width: 18em"></progress>'
        shown = f'<div style="font-family: monospace">{bar} {html.escape(text)}</div>'
        self._output.show({"text/html": shown, "text/plain": text})


class Curves:
    """The metrics of a run as curves, drawn again as each row is logged; shows itself.

        train(config, "runs/mine", on_row=Curves())     # live
        Curves(read_metrics("runs/mine"))               # of a run that was

    Each metric has a panel, with its values of the training and of the evaluations.
    """

    def __init__(self, rows: Iterable[Row] = ()):
        """rows: as in metrics.jsonl, see tracking.read_metrics."""
        self.rows = list(rows)
        self._output = Output()

    def __call__(self, row: Row) -> None:
        """Adds a row in place of those of later steps, of an interrupted run, and draws the curves
        where a notebook is running."""
        self.rows = [one for one in self.rows if one["step"] < row["step"]] + [row]
        if is_running():
            self._output.show({"image/png": self._repr_png_(), "text/plain": repr(self)})

    def __repr__(self) -> str:
        last = f", the last at step {self.rows[-1]['step']}" if self.rows else ""
        return f"Curves of {len(self.rows)} rows{last}"

    def panels(self) -> dict[str, Panel]:
        """{metric: its panel}, in the order in which they were logged; the metrics of evaluations
        that have no value of the training come last."""
        found: dict[str, Panel] = {}
        for row in self.rows:
            for name, value in row.items():
                kind, slash, metric = name.partition("/")
                if slash and metric not in HIDDEN:
                    points = found.setdefault(metric, {}).setdefault(kind, [])
                    points.append((row["step"], value))
        return dict(sorted(found.items(), key=lambda one: "train" not in one[1]))

    def _repr_png_(self) -> bytes:
        from matplotlib.figure import Figure  # takes a third of a second to import

        panels = self.panels()
        columns = max(1, min(COLUMNS, len(panels)))
        lines = -(-len(panels) // columns) or 1
        figure = Figure((3.1 * columns, 2.3 * lines), layout="constrained", facecolor="white")
        for number, (metric, kinds) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(lines, columns, number)
            for kind, points in kinds.items():
                marker = "o" if kind == "eval" or len(points) == 1 else ""
                steps, values = zip(*points, strict=True)
                colour = COLOURS.get(kind)
                axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=kind)
            last = next(reversed(kinds.values()))[-1][1]
            axes.set_title(f"{metric.replace('_', ' ')}: {last:.3g}", fontsize=9)
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if len(kinds) > 1:
                axes.legend(fontsize=7, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()
