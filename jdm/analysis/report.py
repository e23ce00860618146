"""Report: what evaluators found, and the protocol: everything that the figures depend on.

Owns the file report.json, and reports as Markdown and as lines for a terminal. The page with
pictures is in jdm.analysis.page.
"""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdm.analysis.evaluators.base import Curve, Record, Table, Value
from jdm.errors import Failure, InvalidValue
from jdm.files import local_path, read_json
from jdm.names import metric_of

REPORT = "report.json"
ROWS = 20  # of a curve or table that is shown; report.json has them all
_KINDS = {frozenset(kind._fields): kind for kind in (Curve, Table, Record)}

Cells = list[list[str]]  # the header, then rows


class Report(NamedTuple):
    """protocol: {name: what JSON can represent}. results: {evaluator: {name: value}}."""

    protocol: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Value]]

    @property
    def title(self) -> str:
        """What the figures are of, in a line that stands beside them."""
        p = self.protocol
        model = f"{p['checkpoint']} at step {p['step']}"
        return f"{model}, {p['data']} {p['split']} ({p['images']:,} images), seed {p['seed']}"


def to_json(report: Report) -> str:
    """The content of report.json: {"protocol": …, "results": {evaluator: {name: value}}}.

    A curve, a table or a record is an object with the names of its fields. A value that is not a
    number is NaN, as Python's json writes it.
    """
    results = {
        evaluator: {name: _plain(value) for name, value in found.items()}
        for evaluator, found in report.results.items()
    }
    return json.dumps({"protocol": report.protocol, "results": results}, indent=2) + "\n"


@functools.singledispatch
def _plain(value: Any) -> Any:
    return value._asdict()


_plain.register(float, float)


def read(parameter: str, path: str | os.PathLike) -> Report:
    """The report in a file report.json, or in the folder that holds one.

    Raises InvalidValue, about the parameter, where there is none.
    """
    file = Path(local_path(parameter, path))
    file = file / REPORT if file.is_dir() else file
    try:
        held = read_json(file)
        results = {
            evaluator: {name: _value(value) for name, value in found.items()}
            for evaluator, found in held["results"].items()
        }
        report = Report(held["protocol"], results)
        report.title  # noqa: B018  # the protocol has what every report shows
    except OSError as error:
        said = f"is not a report: {file}: {error.strerror}"
        raise InvalidValue(parameter, os.fspath(path), said) from None
    except (Failure, KeyError, TypeError, ValueError, AttributeError) as error:
        why = error if isinstance(error, Failure) else f"{file} is not a report of jdm eval"
        raise InvalidValue(parameter, os.fspath(path), f"cannot be read: {why}") from None
    return report


def _value(held: Any) -> Value:
    return _KINDS[frozenset(held)](**held) if isinstance(held, dict) else float(held)


# What is shown ------------------------------------------------------------------------------------


def number(value: int | float) -> str:
    """Four decimals, or three digits of a small value."""
    return f"{value:.4f}" if not 0 < abs(value) < 0.01 else f"{value:.3g}"


def is_float(value: Value) -> bool:
    """Whether a value is one number, and not a curve, a table or a record."""
    return isinstance(value, float)


def better(name: str) -> str:
    """ "higher" or "lower" values of a metric are better; "" where neither is."""
    metric = metric_of(name)
    return metric.better if metric else ""


def floats(found: Mapping[str, Value]) -> Cells:
    """The numbers among the values of an evaluator; [] where there are none."""
    rows = [[k, number(v), better(k)] for k, v in found.items() if isinstance(v, float)]
    return [["metric", "value", "better"], *rows] if rows else []


@functools.singledispatch
def cells(value: Value, most: int = ROWS) -> Cells:
    """A curve, a table or a record as cells: at most `most` points of a curve, evenly spaced; a
    table with more rows or columns as its size alone."""
    raise TypeError(f"{type(value).__name__} has no cells")


@cells.register
def _(value: Curve, most: int = ROWS) -> Cells:
    count = min(len(value.x), most)
    points = [round(i * (len(value.x) - 1) / max(count - 1, 1)) for i in range(count)]
    columns = [_column(column) for column in (value.x, *value.lines.values())]
    header = [value.x_label, *(_joined(value.y_label, name) for name in value.lines)]
    return [header, *([column[i] for column in columns] for i in points)]


@cells.register
def _(value: Table, most: int = ROWS) -> Cells:
    if max(len(value.rows), len(value.columns)) > most:
        return [["", f"{len(value.rows)} rows, {len(value.columns)} columns: see {REPORT}"]]
    columns = [_column(column) for column in zip(*value.values, strict=True)]
    rows = zip(value.rows, *columns, strict=True) if columns else ([row] for row in value.rows)
    return [["", *value.columns], *map(list, rows)]


@cells.register
def _(value: Record, most: int = ROWS) -> Cells:
    return settings(value.values)


def settings(values: Mapping[str, Any]) -> Cells:
    """A protocol as cells; an entry that is itself a mapping has a row for each of its own."""
    rows: Cells = []
    for name, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        rows += [[f"{name}.{k}", _text(v)] for k, v in inner if v is not None]
        rows += [] if isinstance(value, Mapping) or value is None else [[name, _text(value)]]
    return [["protocol", ""], *rows]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _joined(label: str, name: str) -> str:
    return name if label in ("", name) else f"{name} ({label})"


def _column(values: Sequence[int | float]) -> list[str]:
    """Whole numbers, such as counts, without decimals."""
    whole = all(float(v).is_integer() for v in values)
    return [f"{v:.0f}" if whole else number(v) for v in values]


def lines(found: Mapping[str, Value]) -> list[str]:
    """The values of one evaluator for a terminal: a line for each number, then curves and tables
    of at most ten rows."""
    shown = [f"{k:14} {number(v)}" for k, v in found.items() if isinstance(v, float)]
    for name, value in found.items():
        if not is_float(value):
            shown += [f"{name}:", *(f"  {line}" for line in aligned(cells(value, 10)))]
    return shown


def aligned(rows: Cells) -> list[str]:
    """Cells in columns of one width, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def table(rows: Cells) -> list[str]:
    """Cells as a table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    pieces = [f"| {' | '.join(row)} |" for row in escaped]
    return [pieces[0], f"|{'---|' * len(rows[0])}", *pieces[1:], ""]


def sections(report: Report) -> Iterable[tuple[str, list[tuple[str, Value | None, Cells]]]]:
    """(evaluator, what it shows as (name, value, cells)); first its numbers, which have no name."""
    for evaluator, found in report.results.items():
        numbers = floats(found)
        parts: list[tuple[str, Value | None, Cells]] = [("", None, numbers)] if numbers else []
        parts += [(k, v, cells(v)) for k, v in found.items() if not is_float(v)]
        yield evaluator, parts


def markdown(report: Report) -> str:
    """The content of report.md."""
    shown = [f"# {report.title}", ""]
    for evaluator, parts in sections(report):
        shown += [f"## {evaluator}", "", report.title, ""]
        for name, _, rows in parts:
            shown += ([f"### {name}", ""] if name else []) + table(rows)
    shown += ["## Protocol", "", *table(settings(report.protocol))]
    return "\n".join(shown)
