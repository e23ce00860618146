"""Explanations: counterfactual images, what they show and how far they are, and their files."""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8, UInt32

from jdm import plot
from jdm.analysis.explain.search import Found
from jdm.errors import InvalidValue
from jdm.files import local_path, new_folder, whole_folder, write_whole
from jdm.sampling.labels import label_text

Probabilities = Float[np.ndarray, "n k"]
# Why there is no counterfactual.
UNLIKE = "the image is unlike the training images"
KEPT = "no strength changes the class"
ALREADY = "the model sees the target already"

CHANGED = 0.05  # of the range of pixels: the least change that is counted, hardly visible
MOST = 12  # counterfactuals in one picture


def shown_in(
    probabilities: Probabilities, targets: Num[np.ndarray, "n ..."], confidence: float = 0.0
) -> Bool[np.ndarray, " n"]:
    """Whether the targets are seen, [N]: classes, where the target is the most probable class and
    has at least this probability; attributes, where each of the target that is 1 or 0 has at least
    this probability, and 0.5, to be on or off."""
    if targets.ndim == 1:
        of_target = probabilities[np.arange(len(targets)), targets]
        return np.asarray((probabilities.argmax(axis=1) == targets) & (of_target >= confidence))
    right = np.where(targets == 1, probabilities, 1 - probabilities)
    return np.all((right >= max(confidence, 0.5)) | (targets < 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Explanations:
    """Counterfactuals of N rows, one for each image and seed; shows itself in a notebook.

    images: the number of the image of each row. seeds: uint32 [N]. before: uint8 [N, H, W, C].
    found: see `search.Found`; where nothing was found, its `after` is `before`. targets: classes
    int32 [N], or attributes int8 [N, K]. probabilities_before, _after, _control: of the model,
    float32 [N, K]; control is the image through the same noise and mask without guidance.
    reference_before, reference_after: probabilities of the reference classifier, or None.
    reasons: why there is no counterfactual, "" where there is one. novelty: the percentile of the
    image's distance to the training images among theirs, [N], or None. feature_distance: between
    before and after, in the model's bottleneck. settings: the options. class_names: of the model.
    """

    images: Int[np.ndarray, " n"]
    seeds: UInt32[np.ndarray, " n"]
    before: UInt8[np.ndarray, "n h w c"]
    found: Found
    targets: Num[np.ndarray, "n ..."]
    probabilities_before: Probabilities
    probabilities_after: Probabilities
    probabilities_control: Probabilities
    reference_before: Probabilities | None
    reference_after: Probabilities | None
    reasons: tuple[str, ...]
    novelty: Float[np.ndarray, " n"] | None
    feature_distance: Float[np.ndarray, " n"]
    settings: dict[str, Any]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.before)

    @property
    def after(self) -> UInt8[np.ndarray, "n h w c"]:
        """The counterfactuals; the image itself where there is none, see `reasons`."""
        return self.found.after

    @property
    def valid(self) -> Bool[np.ndarray, " n"]:
        """Whether a counterfactual was found."""
        return np.array([reason == "" for reason in self.reasons])

    @property
    def searched(self) -> Bool[np.ndarray, " n"]:
        """Whether a counterfactual was searched for."""
        return np.array([reason in ("", KEPT) for reason in self.reasons])

    @property
    def agreed(self) -> Bool[np.ndarray, " n"] | None:
        """Whether the reference classifier sees the target in the counterfactual too."""
        if self.reference_after is None:
            return None
        return self.valid & shown_in(self.reference_after, self.targets)

    @property
    def change(self) -> Float[np.ndarray, "n h w c"]:
        """after - before, in units of the range of pixels: in [-1, 1]."""
        return (self.after.astype(np.float32) - self.before) / 255

    @property
    def l1(self) -> Float[np.ndarray, " n"]:
        """The sum of |change| over all pixels and channels."""
        return np.abs(self.change).reshape(len(self), -1).sum(axis=1)

    @property
    def l2(self) -> Float[np.ndarray, " n"]:
        """The Euclidean norm of the change."""
        return np.linalg.norm(self.change.reshape(len(self), -1), axis=1)

    @property
    def changed(self) -> Float[np.ndarray, " n"]:
        """The share of pixels of which a channel changed by more than 5 % of its range."""
        return (np.abs(self.change).max(axis=-1) > CHANGED).reshape(len(self), -1).mean(axis=1)

    def of_target(self, probabilities: Probabilities) -> Float[np.ndarray, " n"]:
        """The probability of the target; of attributes, the product of those that it holds."""
        if self.targets.ndim == 1:
            return probabilities[np.arange(len(self)), self.targets]
        right = np.where(self.targets == 1, probabilities, 1 - probabilities)
        return np.where(self.targets < 0, 1.0, right).prod(axis=1)

    def summary(self) -> dict[str, float]:
        """Figures over all rows. Shares are of the rows that were searched for: those whose image
        is not unlike the training images, and did not show the target before. Distances are means
        over the counterfactuals; NaN where there is none."""
        valid, searched = self.valid, self.searched
        count = max(int(searched.sum()), 1)

        def mean(values: np.ndarray) -> float:
            return float(values[valid].mean()) if valid.any() else float("nan")

        control = shown_in(self.probabilities_control, self.targets)
        found = {
            "rows": float(len(self)),
            "searched": float(searched.sum()),
            "valid": valid.sum() / count,
            "valid_again": (valid & self.found.still).sum() / count,
            "control": (valid & control).sum() / count,
            "strength": mean(self.found.strength),
            "l1": mean(self.l1),
            "l2": mean(self.l2),
            "changed": mean(self.changed),
            "feature_distance": mean(self.feature_distance),
        }
        if self.agreed is not None:
            found["agreed"] = self.agreed.sum() / count
        return {name: float(value) for name, value in found.items()}

    def records(self) -> list[dict[str, Any]]:
        """One row of figures for each counterfactual, ready for JSON and CSV."""
        seen = self.probabilities_before.argmax(axis=1)
        found = []
        for i in range(len(self)):
            row = {
                "image": int(self.images[i]),
                "seed": int(self.seeds[i]),
                "target": label_text(self.targets[i], self.class_names),
                "found": bool(self.valid[i]),
                "reason": self.reasons[i],
                "target_before": self.of_target(self.probabilities_before)[i],
                "target_after": self.of_target(self.probabilities_after)[i],
                "target_control": self.of_target(self.probabilities_control)[i],
                "still": bool(self.found.still[i]),
                "strength": self.found.strength[i],
                "share": self.found.share[i],
                "draw": int(self.found.draw[i]),
                "l1": self.l1[i],
                "l2": self.l2[i],
                "changed": self.changed[i],
                "feature_distance": self.feature_distance[i],
            }
            if self.targets.ndim == 1:
                row["seen_before"] = label_text(seen[i], self.class_names)
            if self.agreed is not None:
                row["agreed"] = bool(self.agreed[i])
            if self.novelty is not None:
                row["novelty"] = self.novelty[i]
            plain = {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()}
            found.append({k: None if v != v else v for k, v in plain.items()})
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Writes a .png, an .npz, or a folder where the path has no suffix.

        .png: the first twelve counterfactuals. .npz: all arrays, the figures and settings. A
        folder: a figure and a film of each counterfactual, explanations.csv, summary.json with the
        settings, and summary.png.

        The file or folder appears whole or not at all. Raises InvalidValue for another suffix, and
        for a folder that is not empty.
        """
        out = check_out(path)
        if out.suffix:
            write_whole(out, FORMATS[out.suffix](self))
            return
        from jdm.analysis.explain import figure

        with whole_folder(out) as folder:
            for i in range(len(self)):
                (folder / f"{i:06}.png").write_bytes(figure.of_rows(self, [i]))
                frames = [plot.grid(frame[i : i + 1], 1) for frame in self.found.film]
                (folder / f"{i:06}.gif").write_bytes(plot.gif(frames, least_width=256))
            (folder / "explanations.csv").write_text(self._csv())
            report = {"summary": self.summary(), "settings": self.settings}
            (folder / "summary.json").write_text(json.dumps(report, indent=2, default=list) + "\n")
            (folder / "summary.png").write_bytes(figure.of_summary(self))

    def _csv(self) -> str:
        text, rows = io.StringIO(), self.records()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _npz(self) -> bytes:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {
            name: value
            for name, value in {**vars(self), **self.found._asdict()}.items()
            if isinstance(value, np.ndarray)
        }
        figures = json.dumps({"records": self.records(), "settings": self.settings}, default=list)
        np.savez_compressed(buffer, **arrays, figures=figures)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        from jdm.analysis.explain import figure

        return figure.of_rows(self, range(min(len(self), MOST)))


FORMATS = {".png": Explanations._repr_png_, ".npz": Explanations._npz}


def check_out(path: str | os.PathLike) -> Path:
    """A path that Explanations can be saved to. Raises InvalidValue for another one."""
    out = Path(local_path("out", path))
    if out.suffix and out.suffix not in FORMATS:
        allowed = f"must end in {' or '.join(FORMATS)}, or be a new folder"
        raise InvalidValue("out", str(path), allowed)
    if out.suffix and not out.parent.is_dir():
        missing = f"cannot be written: the folder {out.parent} does not exist"
        raise InvalidValue("out", str(path), missing)
    return out if out.suffix else new_folder("out", out)
