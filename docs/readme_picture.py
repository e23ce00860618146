"""Draws the picture of README.md with the packaged model of digits: docs/pictures/front.png.

    python docs/readme_picture.py [--out=docs/pictures/front.png]

From left to right: samples, a class in each column; counterfactuals of test digits; the reliability
diagram of the test split. The seeds are fixed, so the same versions draw the same picture.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import jdm
from jdm import plot, startup
from jdm.analysis.calibration import reliability
from jdm.analysis.explain.figure import change_map
from jdm.analysis.figures import drawn
from jdm.analysis.logits import labelled_logits
from jdm.data.splits import load_split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jdm.analysis.explain.explanations import Explanations

ROWS = 6  # of samples
PAIRS = ((1, 7), (5, 6), (9, 4))  # of a digit and what it becomes
COLUMNS = ("before", "after", "change")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is drawn: samples uint8 [60, 8, 8, 1], counterfactuals, and the bins of confidence."""

    samples: np.ndarray
    found: "list[Explanations]"
    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    error: float


def computed() -> Parts:
    """Samples, counterfactuals and calibration of the packaged model."""
    joint, test = jdm.load("digits"), load_split("digits", "test")
    samples = jdm.sample(joint, labels=np.tile(np.arange(10), ROWS), seeds=range(10 * ROWS))
    firsts = [test.images[np.flatnonzero(test.labels == digit)[0]] for digit, _ in PAIRS]
    found = [
        jdm.explain(joint, image[None], target=target)
        for image, (_, target) in zip(firsts, PAIRS, strict=True)
    ]
    bins = reliability(*labelled_logits(joint, test, 360))
    return Parts(
        samples.images,
        found,
        bins.confidence,
        bins.accuracy,
        bins.share,
        bins.expected_calibration_error,
    )


def draw(figure: "Figure", parts: Parts) -> None:
    """The three panels, each with its title."""
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.75, 1.0, 1.15))
    axes = left.add_subplot()
    axes.set_title("samples, a class in each column")
    _show(axes, plot.grid(parts.samples, columns=10))
    middle.suptitle("counterfactuals", fontsize="large")
    cells = middle.subplots(len(PAIRS), len(COLUMNS))
    for row, (found, (digit, target)) in enumerate(zip(parts.found, PAIRS, strict=True)):
        before, after = found.before[0], found.after[0]
        for column, image in enumerate((before, after, change_map(before, after))):
            _show(cells[row, column], image)
        cells[row, 0].set_ylabel(f"{digit} to {target}", rotation=0, ha="right", va="center")
    for axes, title in zip(cells[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize="medium")
    axes = right.add_subplot()
    axes.set_title("reliability on the test digits")
    axes.plot([0, 1], [0, 1], "--", color="grey", label="if calibrated")
    axes.scatter(parts.confidence, parts.accuracy, s=20 + 200 * parts.share, label="accuracy")
    axes.text(0.97, 0.04, f"calibration error {parts.error:.3f}", ha="right")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.05), ylim=(0, 1.05), aspect=1)
    axes.legend(loc="center left")


def _show(axes: "Axes", image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "pictures" / "front.png")
    out = parser.parse_args().out
    startup.set_up()
    parts = computed()
    out.write_bytes(drawn(lambda figure: draw(figure, parts), (10.0, 2.7)).light)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
