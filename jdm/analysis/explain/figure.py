"""Pictures of counterfactuals, drawn with matplotlib, as the content of PNG files."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from jdm.sampling.labels import label_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jdm.analysis.explain.explanations import Explanations

ADDED, REMOVED = (0.84, 0.15, 0.16), (0.12, 0.35, 0.75)  # red, blue
FRAMES = 6  # of the film, in a figure
STRONGEST = 0.5  # the change, as a share of the range of pixels, that is drawn in full colour


def of_rows(found: "Explanations", rows: Sequence[int]) -> bytes:
    """PNG: for each row the image, the counterfactual, what was added and removed, the control,
    the film, and the figures."""
    figure = _figure(13.0, 1.75 * len(rows) + 0.5)
    columns = ["before", "after", "added, removed", "control"]
    grid = figure.add_gridspec(
        len(rows), len(columns) + FRAMES + 1, width_ratios=[1] * 4 + [0.55] * FRAMES + [2.6]
    )
    for line, row in enumerate(rows):
        valid = bool(found.valid[row])
        changes = change_map(found.before[row], found.after[row])
        shown = [found.before[row], found.after[row], changes, found.found.control[row]]
        for column, (title, image) in enumerate(zip(columns, shown, strict=True)):
            axes = figure.add_subplot(grid[line, column])
            if valid or column == 0:
                _draw(axes, image)
            axes.axis("off")
            if line == 0:
                axes.set_title(title, fontsize=9)
        frames = np.unique(np.linspace(0, _last_frame(found, row), FRAMES).round().astype(int))
        for column, frame in enumerate(frames if valid else []):
            axes = figure.add_subplot(grid[line, len(columns) + column])
            _draw(axes, found.found.film[frame, row])
            axes.axis("off")
            if line == 0 and column == 0:
                axes.set_title("rising strength", fontsize=9, loc="left")
        axes = figure.add_subplot(grid[line, -1])
        axes.axis("off")
        axes.text(0, 1, _figures(found, row), fontsize=8, va="top", transform=axes.transAxes)
    return _png(figure)


def of_summary(found: "Explanations") -> bytes:
    """PNG: for each pair of classes, the mean of the changes: what is added and what is removed."""
    pairs = _pairs(found)
    columns = min(4, max(1, len(pairs)))
    lines = max(1, -(-len(pairs) // columns))
    figure = _figure(3.0 * columns, 3 * lines + 0.6)
    for number, (name, rows) in enumerate(pairs.items(), 1):
        axes = figure.add_subplot(lines, columns, number)
        maps = [signed_change(found.before[i], found.after[i]) for i in rows]
        _draw(axes, _coloured(np.mean(maps, axis=0)))
        axes.axis("off")
        axes.set_title(f"{name} ({len(rows)})", fontsize=9)
    figure.suptitle("mean change: added in red, removed in blue", fontsize=9)
    return _png(figure)


def signed_change(
    before: UInt8[np.ndarray, "h w c"], after: UInt8[np.ndarray, "h w c"]
) -> Float[np.ndarray, "h w"]:
    """How far each pixel moved from the colour of the background (positive: something was added) or
    toward it (negative: removed), as shares of the range. The background is the median colour along
    the border of the image."""
    border = np.concatenate([before[0], before[-1], before[:, 0], before[:, -1]])
    background = np.median(border, axis=0)
    scale = 255 * np.sqrt(before.shape[-1])
    a, b = (np.linalg.norm(x - background, axis=-1) / scale for x in (before, after))
    size = np.linalg.norm(after.astype(np.float32) - before, axis=-1) / scale
    return np.where(b >= a, size, -size)


def change_map(
    before: UInt8[np.ndarray, "h w c"], after: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "h w 3"]:
    """What was added in red and what was removed in blue, on white."""
    return _coloured(signed_change(before, after))


def _coloured(change: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    size = np.minimum(np.abs(change) / STRONGEST, 1)[..., None]
    colour = np.where(change[..., None] > 0, ADDED, REMOVED)
    return np.round(255 * (1 - size + size * colour)).astype(np.uint8)


def _last_frame(found: "Explanations", row: int) -> int:
    """The frame in which the counterfactual is reached; later ones are the same."""
    strengths = list(found.settings["strengths"])
    strength = found.found.strength[row]
    return strengths.index(strength) + 1 if strength in strengths else len(strengths)


def _pairs(found: "Explanations") -> dict[str, list[int]]:
    """{"red to white": the rows of these counterfactuals}; of attributes, by the target alone."""
    pairs: dict[str, list[int]] = {}
    seen = found.probabilities_before.argmax(axis=1)
    for row in np.flatnonzero(found.valid):
        name = label_text(found.targets[row], found.class_names)
        if found.targets.ndim == 1:
            name = f"{label_text(seen[row], found.class_names)} to {name}"
        pairs.setdefault(name, []).append(int(row))
    return pairs


def _figures(found: "Explanations", row: int) -> str:
    """The figures of a row, as lines of text."""
    record = found.records()[row]
    if not record["found"]:
        return f"no counterfactual to {record['target']}:\n{record['reason']}"
    lines = [
        f"{record.get('seen_before', 'target')} to {record['target']}",
        f"p(target) {record['target_before']:.3f} to {record['target_after']:.3f}",
        f"control {record['target_control']:.3f}, strength {record['strength']:g}",
        f"holds after new noise: {'yes' if record['still'] else 'no'}",
    ]
    if "agreed" in record:
        lines.append(f"reference agrees: {'yes' if record['agreed'] else 'no'}")
    lines.append(f"L1 {record['l1']:.1f}, L2 {record['l2']:.2f}, changed {record['changed']:.0%}")
    if record.get("novelty") is not None:
        lines.append(f"distance to training data: percentile {record['novelty']:.0f}")
    return "\n".join(lines)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # takes a third of a second to import

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _draw(axes, image: UInt8[np.ndarray, "h w c"]) -> None:
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
