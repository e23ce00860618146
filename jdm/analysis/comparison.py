"""Comparison: the figures of several reports side by side, and where their protocols differ."""

import functools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jdm.analysis.evaluators.base import Curve
from jdm.analysis.figures import Picture, draw_bars, draw_lines, drawn
from jdm.analysis.page import figure, page, paragraph, table
from jdm.analysis.report import Cells, Report, better, is_float, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The parts of a protocol that figures must share to be comparable. The others say what is compared.
PROTOCOL = "data contents split images size seed samples features method ood".split()
MARK = "**"  # around the best value: bold in Markdown

Reports = Mapping[str, Report]  # {the path it was read from: a report}


def differences(reports: Reports) -> list[str]:
    """A sentence for each part of the protocol in which the reports differ."""
    found = []
    for name in PROTOCOL:
        values = {path: report.protocol.get(name) for path, report in reports.items()}
        keys = sorted({k for v in values.values() if isinstance(v, dict) for k in v}) or [""]
        for key in keys:
            shown = {
                path: json.dumps(value.get(key) if isinstance(value, dict) else value)
                for path, value in values.items()
            }
            if len(set(shown.values())) > 1:
                full = f"{name}.{key}" if key else name
                each = ", ".join(f"{value} in {path}" for path, value in shown.items())
                found.append(f"The reports differ in {full}: {each}.")
    return found


def compared(reports: Reports) -> Cells:
    """A row for each number, with the best of those that are there marked; see `names.METRICS`."""
    rows: Cells = [["evaluator", "metric", "better", *reports]]
    for evaluator, name in _names(reports):
        values = [_number(report, evaluator, name) for report in reports.values()]
        best = _best(name, values)
        shown = [MARK * (v == best) + _shown(v) + MARK * (v == best) for v in values]
        rows.append([evaluator, name, better(name), *shown])
    return rows


def _best(name: str, values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    choose = {"higher": max, "lower": min}.get(better(name))
    return choose(known) if choose and len(known) > 1 else None


def _shown(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _names(reports: Reports) -> list[tuple[str, str]]:
    """(evaluator, name) of every number, in the order of the first report that has it."""
    found = {
        (evaluator, name): None
        for report in reports.values()
        for evaluator, values in report.results.items()
        for name, value in values.items()
        if is_float(value)
    }
    return list(found)


def _number(report: Report, evaluator: str, name: str) -> float:
    """A number of a report; NaN where it has none."""
    value = report.results.get(evaluator, {}).get(name)
    return value if isinstance(value, float) else math.nan


def picture(reports: Reports) -> Picture:
    """A panel for each number, with a bar for each report, and for each curve, with its lines."""
    curves: dict[tuple[str, str], dict[str, Curve]] = {}
    for path, report in reports.items():
        for evaluator, values in report.results.items():
            for name, value in values.items():
                if isinstance(value, Curve):
                    curves.setdefault((evaluator, name), {})[path] = value
    count = len(_names(reports)) + len(curves)
    columns = min(3, count)
    size = (4.2 * columns, 3.2 * -(-count // columns))
    return drawn(functools.partial(_draw, reports=reports, curves=curves, columns=columns), size)


def _draw(
    figure: "Figure",
    reports: Reports,
    curves: Mapping[tuple[str, str], Mapping[str, Curve]],
    columns: int,
) -> None:
    names = _names(reports)
    rows = -(-(len(names) + len(curves)) // columns)
    panels = iter([figure.add_subplot(rows, columns, 1 + i) for i in range(len(names + [*curves]))])
    for evaluator, name in names:
        axes, direction = next(panels), better(name)
        axes.set_title(f"{name} ({direction} is better)" if direction else name)
        values = [_number(report, evaluator, name) for report in reports.values()]
        draw_bars(axes, list(reports), values)
    for (_, name), by_path in curves.items():
        axes = next(panels)
        axes.set_title(name)
        lines = {
            f"{path}: {line}" if len(curve.lines) > 1 else path: (curve.x, y)
            for path, curve in by_path.items()
            for line, y in curve.lines.items()
        }
        draw_lines(axes, next(iter(by_path.values())), lines)


def html(reports: Reports) -> str:
    """A page with the table, the differences between the protocols, and the figure."""
    title = f"Comparison of {', '.join(reports)}"
    titles = [paragraph(f"{path}: {report.title}") for path, report in reports.items()]
    notes = [paragraph(sentence) for sentence in differences(reports)]
    shown = [table(compared(reports), MARK), figure(picture(reports), title)]
    return page(title, [*titles, *notes, *shown])
