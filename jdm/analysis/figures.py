"""Pictures of curves, tables and compared reports, drawn with Matplotlib: PNG for light and for
dark pages."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jdm.analysis.evaluators.base import Curve, Table, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = 12  # rows of a matrix whose cells are labelled with their values
THEMES = {"light": ("white", "black", "#cccccc"), "dark": ("#1b1b1b", "#e6e6e6", "#555555")}


class Picture(NamedTuple):
    """A picture as two PNGs, one for each theme."""

    light: bytes
    dark: bytes


@functools.singledispatch
def picture(value: Value) -> Picture | None:
    """The picture of a curve, or of a table whose rows have the names of its columns, such as a
    confusion matrix; None of anything else."""
    return None


@picture.register
def _(value: Curve) -> Picture:
    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        draw_lines(axes, value, {name: (value.x, y) for name, y in value.lines.items()})

    return drawn(draw, (6.0, 3.6))


@picture.register
def _(value: Table) -> Picture | None:
    if tuple(value.rows) != tuple(value.columns):
        return None
    return drawn(functools.partial(_draw_matrix, table=value), (6.0, 5.4))


def _draw_matrix(figure: "Figure", table: Table) -> None:
    """Each cell is coloured by its share of its row, since classes may differ in size."""
    values = np.array(table.values, float)
    shares = values / np.maximum(np.abs(values).sum(axis=1, keepdims=True), 1e-12)
    axes, count = figure.add_subplot(), len(values)
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the row")
    if count <= NUMBERED:
        for i, j in np.ndindex(values.shape):
            colour = "black" if shares[i, j] > 0.6 else "white"
            text = f"{values[i, j]:g}"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
    each = -(-count // 20)  # of many names, not all are readable
    axes.set_xticks(range(0, count, each), table.columns[::each], rotation=90)
    axes.set_yticks(range(0, count, each), table.rows[::each])


def draw_lines(axes: "Axes", labels: Curve, lines: Mapping[str, tuple[Any, Any]]) -> None:
    """Lines {name: (x, y)}, with the labels of a curve."""
    for name, (x, y) in lines.items():
        axes.plot(x, y, label=name, marker="." if len(x) <= 30 else "")
    axes.set_xlabel(labels.x_label)
    axes.set_ylabel(labels.y_label)
    axes.grid(True)
    if len(lines) > 1:
        axes.legend()


def draw_bars(axes: "Axes", names: Sequence[str], values: Sequence[float]) -> None:
    """A bar for each name; a NaN has none."""
    places = range(len(names))
    axes.bar(places, np.nan_to_num(values), color=[f"C{i % 10}" for i in places])
    axes.set_xticks(places, names, rotation=20, ha="right")
    axes.set_axisbelow(True)
    axes.grid(True, axis="y")


def drawn(draw: Callable[["Figure"], None], size: tuple[float, float]) -> Picture:
    """The picture of what `draw` draws on a figure. size: width and height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    pngs = []
    for background, ink, lines in THEMES.values():
        inked = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color".split()
        filled = "figure.facecolor axes.facecolor savefig.facecolor legend.facecolor".split()
        style: Any = dict.fromkeys(inked, ink) | dict.fromkeys(filled, background)
        with matplotlib.rc_context(style | {"grid.color": lines, "font.size": 9}):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            buffer = io.BytesIO()
            # Without the version of Matplotlib, the same figure is the same file.
            figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        pngs.append(buffer.getvalue())
    return Picture(*pngs)
