"""What `jdm probe` writes: the probes of one or more models as JSON, CSV, a picture and text.

Owns the formats of these files. Measures nothing.
"""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdm.analysis.probe import ITERATIONS, PROBES, Probe

PROTOCOL = {
    "features": "spatial means of the blocks' outputs with the EMA weights; images as they are at "
    "t = 0, and noised to level t above it",
    "probes": {kind: f"{one.words} of standardised features" for kind, one in PROBES.items()},
    "candidates": {f"{kind}, {one.setting}": one.candidates for kind, one in PROBES.items()},
    "chosen_on": "validation: setting, block and t; of equal accuracies the first counts: of the "
    "lowest t, then of the first block, then of the smoothest probe",
}
# Colours of the lines, one for each kind of probe; they can be told apart without colour vision.
COLOURS = dict(zip(PROBES, ("#0072b2", "#d55e00"), strict=True))


def as_json(probes: Mapping[str, Probe], source: Mapping[str, Any]) -> str:
    """The content of probe.json. probes: by checkpoint. source: further facts, such as the data."""
    models = {name: _model(one) for name, one in probes.items()}
    return json.dumps({**source, "protocol": PROTOCOL, "models": models}, indent=2) + "\n"


def _model(one: Probe) -> dict[str, Any]:
    grids = {}
    for kind, grid in one.grids.items():
        grids[kind] = {
            "block": grid.block,
            "t": grid.level,
            PROBES[kind].setting: grid.setting,
            "validation_accuracy": grid.validation,
            "test_accuracy": grid.test,
            "test_accuracy_of_pixels": one.pixels[kind],
            "validation_accuracies": dict(zip(one.blocks, grid.accuracy.T.tolist(), strict=True)),
            "settings": dict(zip(one.blocks, grid.settings.T.tolist(), strict=True)),
            "not_converged": grid.stopped,
        }
    return {
        "T": one.steps,
        "levels": one.levels,
        "images": dict(one.images),
        "probes": grids,
        "classifier_test_accuracy": one.classifier,
        "shape_over_t": one.shape._asdict(),
    }


def as_csv(probes: Mapping[str, Probe]) -> str:
    """The content of probe.csv: a row for each checkpoint, kind of probe, block and level."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["checkpoint", "probe", "block", "t", "setting", "validation_accuracy"])
    for name, one in probes.items():
        for kind, grid in one.grids.items():
            for j, block in enumerate(one.blocks):
                for i, t in enumerate(one.levels):
                    cell = (grid.settings[i, j].item(), grid.accuracy[i, j].item())
                    rows.writerow([name, kind, block, t, *cell])
    return text.getvalue()


def as_text(probes: Mapping[str, Probe]) -> str:
    """A table for the terminal, and a sentence about each model."""
    columns = "{:24} {:10} {:12} {:>5} {:>6} {:>11}  {}"
    lines = [columns.format("checkpoint", "", "block", "t", "", "validation", "test")]
    for name, one in probes.items():
        shown, test = name if len(name) <= 24 else f"…{name[-23:]}", one.images["test"]
        for kind, grid in one.grids.items():
            setting = f"{PROBES[kind].setting}={grid.setting:g}"
            cells = (grid.block, grid.level, setting, f"{grid.validation:.4f}")
            lines.append(columns.format(shown, kind, *cells, _with_error(grid.test, test)))
        for kind, accuracy in one.pixels.items():
            pixels = ("pixels", "", "", "", _with_error(accuracy, test))
            lines.append(columns.format(shown, kind, *pixels))
        if one.classifier is not None:
            own = ("", 0, "", "", _with_error(one.classifier, test))
            lines.append(columns.format(shown, "classifier", *own))
    said = []
    for name, one in probes.items():
        for kind, grid in one.grids.items():
            if grid.stopped:
                at = f"ended at {ITERATIONS:,} iterations, before they converged"
                said.append(f"{name}: {grid.stopped} of {grid.accuracy.size} {kind} probes {at}.")
        said.append(f"{name}: {one.shape.sentence}")
    return "\n".join([*lines, "Accuracies; ± is two standard errors.", *said])


def _with_error(accuracy: float, images: int) -> str:
    """An accuracy with two standard errors of a share of this number of images."""
    return f"{accuracy:.4f} ± {2 * np.sqrt(accuracy * (1 - accuracy) / images):.4f}"


def as_png(probes: Mapping[str, Probe]) -> bytes:
    """The content of probe.png. For each model, one beside the other, validation accuracies: of the
    linear probe by block and t, of the best block of each kind over t, and over blocks at the best
    t of each kind. All models have the same scales."""
    from matplotlib.figure import Figure

    most = max(len(one.blocks) for one in probes.values())
    heights = (max(2.0, 0.22 * most), 2.2, 2.2)  # inches
    figure = Figure((1.2 + 3.6 * len(probes), 1.8 + sum(heights)), layout="constrained")
    axes = figure.subplots(3, len(probes), squeeze=False, height_ratios=heights)
    lowest = min(grid.accuracy.min() for one in probes.values() for grid in one.grids.values())
    for column, (name, one) in zip(axes.T, probes.items(), strict=True):
        grid, (heat, over_t, over_blocks) = one.grids["linear"], column
        levels, blocks = np.arange(len(one.levels)), np.arange(len(one.blocks))
        image = heat.imshow(grid.accuracy.T, vmin=lowest, vmax=1, aspect="auto", cmap="viridis")
        star = (one.levels.index(grid.level), one.blocks.index(grid.block))
        heat.plot(*star, "*", color="white", markeredgecolor="black", markersize=11)
        heat.set_title(name if len(name) <= 32 else f"…{name[-31:]}", fontsize=9)
        heat.set_yticks(blocks, one.blocks)
        for kind, found in one.grids.items():
            line = dict(color=COLOURS[kind], marker=".", linewidth=1.2)
            at_block = found.accuracy[:, one.blocks.index(found.block)]
            over_t.plot(levels, at_block, label=f"{kind}, {found.block}", **line)
            at_t = found.accuracy[one.levels.index(found.level)]
            over_blocks.plot(blocks, at_t, label=f"{kind}, t = {found.level}", **line)
        for axis in (heat, over_t):
            axis.set_xticks(levels, map(str, one.levels))
            axis.set_xlabel(f"noise level t, of {one.steps}", fontsize=8)
        over_blocks.set_xticks(blocks, one.blocks, rotation=90)
        for axis in (over_t, over_blocks):
            axis.set_ylim(lowest - 0.03, 1.02)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc="best")
        for axis in column:
            axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes[0], label="accuracy, linear probe").ax.tick_params(labelsize=7)
    for row in (1, 2):
        axes[row, 0].set_ylabel("validation accuracy", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()
