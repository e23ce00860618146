"""The figures of several runs of benchmarks/sampling.py in one table: mean (least to greatest).

    python benchmarks/spread.py runs/sampling-digits-*/report.json

The runs have the same rows, and differ in their seeds.
"""

import json
import statistics
import sys
from pathlib import Path

FIGURES = {  # column: (a row of a report -> its figure or None, how it is written)
    "agreement": (lambda row: row["agreement"] and min(row["agreement"].values()), "{:.1%}"),
    "Fréchet distance": (lambda row: row["distance"], "{:.3f}"),
    "distance": (lambda row: row["neighbours"]["mean"], "{:.2f}"),
    "diversity": (lambda row: row["diversity"] and row["diversity"]["mean"], "{:.2f}"),
}


def cell(figures: list[float | None], written: str) -> str:
    if None in figures:
        return "-"
    mean, least, most = (f(figures) for f in (statistics.mean, min, max))
    if least == most:
        return written.format(mean)
    return f"{written.format(mean)} ({written.format(least)} to {written.format(most)})"


def rows_of(path: str) -> dict[str, dict]:
    """{name: row} of a report. Exits with a sentence where it is none."""
    try:
        return {row["name"]: row for row in json.loads(Path(path).read_text())["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"spread.py: {path} is no report of sampling.py ({type(error).__name__}: {error})")


def main() -> None:
    named = [rows_of(path) for path in sys.argv[1:]]
    if not named or any(rows.keys() != named[0].keys() for rows in named):
        sys.exit("spread.py: needs one report.json or more, all with the same rows")
    print(f"| row | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for name in named[0]:
        cells = [
            cell([figure(rows[name]) for rows in named], written)
            for figure, written in FIGURES.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
