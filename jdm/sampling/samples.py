"""Samples: generated images and how they were made; files of them."""

import dataclasses
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8, UInt32

from jdm import plot
from jdm.files import write_whole

FORMATS = (".png", ".npz", ".gif")
SETTINGS = "settings.json"
CAPTIONED = 100  # images at most that are shown with captions


@dataclasses.dataclass(frozen=True)
class Samples:
    """Generated images; shows itself as a grid in a notebook.

    images: uint8 [N, H, W, C]. labels: what was asked for, or None: classes int32 [N] (-1 is
    nothing), probabilities float32 [N, K], or attributes int8 [N, K] (-1 is not asked for). seeds:
    [N]. probabilities: that the classifier sees what was asked for in the image, float32 [N], NaN
    where nothing was; None without labels. film: the estimates of the images on the way, uint8
    [steps, N, H, W, C], or None. settings: how they were made.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Num[np.ndarray, "n ..."] | None
    seeds: UInt32[np.ndarray, " n"]
    settings: dict[str, Any]
    probabilities: Float[np.ndarray, " n"] | None = None
    film: UInt8[np.ndarray, "s n h w c"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the images to a file, or to a folder where the path has no ending.

        .png: a grid. .gif: a grid that moves from noise to the images (sample with film=True).
        .npz: arrays arr_0 (the images, as guided-diffusion's evaluator reads them), labels (-1:
        none), seeds, probabilities and settings. A folder: a PNG of each image, samples.csv and
        settings.json.

        The file or folder appears whole or not at all. Raises ValueError for another ending, a
        .gif without a film, and a folder that holds anything but samples of the same settings.
        """
        path = Path(path)
        ending = check_format(path)
        if ending == "":
            self._save_folder(path)
        else:
            write_whole(path, {".png": self._png, ".gif": self._gif, ".npz": self._npz}[ending]())

    def _npz(self) -> bytes:
        none = np.full(len(self), -1, np.int32)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            arr_0=self.images,
            labels=none if self.labels is None else self.labels,
            seeds=self.seeds,
            probabilities=self._probabilities(),
            settings=json.dumps(self.settings),
        )
        return buffer.getvalue()

    def _probabilities(self) -> Float[np.ndarray, " n"]:
        none = np.full(len(self), np.nan, np.float32)
        return none if self.probabilities is None else self.probabilities

    def _repr_png_(self) -> bytes:
        """The grid, with what was asked for, and how sure the classifier is of it, below each."""
        if self.labels is None or len(self) > CAPTIONED:
            return self._png()
        words = []
        for label, probability in zip(self.labels, self._probabilities(), strict=True):
            asked = _in_words(label)
            known = "" if np.isnan(probability) else f" {probability:.0%}"
            words.append(asked + known)
        return plot.captioned(self.images, words, self._columns())

    def _png(self) -> bytes:
        return plot.png(self._grid(self.images))

    def _columns(self) -> int:
        return int(np.ceil(np.sqrt(len(self))))

    def _gif(self) -> bytes:
        if self.film is None:
            raise ValueError("a .gif shows the images on the way: sample with film=True")
        return plot.gif([self._grid(images) for images in self.film])

    def _grid(self, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "high wide c"]:
        return plot.grid(images, self._columns())

    def _save_folder(self, path: Path) -> None:
        check_folder(path, self.settings)
        path = path.resolve()  # where a link leads, what it leads to is replaced
        partial, before = _beside(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        rows = ["file,seed,label,probability"]
        for i, image in enumerate(self.images):
            name = f"{i:06}.png"
            (partial / name).write_bytes(plot.png(image, least_width=1))
            label = "" if self.labels is None else _in_words(self.labels[i])
            rows.append(f"{name},{self.seeds[i]},{label},{self._probabilities()[i]:.6g}")
        (partial / "samples.csv").write_text("\n".join(rows) + "\n")
        (partial / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
        if path.is_dir():
            shutil.rmtree(before, ignore_errors=True)
            path.rename(before)
        partial.rename(path)
        if before.is_dir():
            shutil.rmtree(before)


def _in_words(label: np.ndarray | np.generic) -> str:
    """ "3", "none", "3:0.7+5:0.3" or "3+!5": as --labels would have it."""
    if label.ndim == 0:
        return "none" if label < 0 else str(label)
    if np.issubdtype(label.dtype, np.floating):
        return "+".join(f"{k}:{label[k]:.2g}" for k in np.flatnonzero(label)) or "none"
    return "+".join(f"{'' if label[k] else '!'}{k}" for k in np.flatnonzero(label >= 0)) or "none"


def check_format(path: str | os.PathLike) -> str:
    """The ending of a file that Samples can be saved to, "" for a folder; ValueError for others."""
    ending = Path(path).suffix
    if not Path(path).name:
        raise ValueError(f"out={str(path)!r} must name a file or a folder")
    if ending and ending not in FORMATS:
        raise ValueError(
            f"out={str(path)!r} must end in one of {', '.join(FORMATS)}, or be a folder"
        )
    return ending


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a folder is written until it is whole, and where the one it replaces waits for that."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.before")


def _foreign(folder: Path) -> str | None:
    """The first name in a folder that is not of samples."""
    names = {p.name for p in folder.iterdir()} - {SETTINGS, "samples.csv"}
    return min((name for name in names if not re.fullmatch(r"\d{6,}\.png", name)), default=None)


def check_folder(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where a folder holds anything but samples of these settings."""
    out = path = path.resolve()
    if path.is_mount():
        raise ValueError(f"out={str(out)!r} is where a disk is mounted; name a folder in it")
    for other in _beside(path):  # what a run that was killed left is removed, and nothing else
        if other.exists() and (not other.is_dir() or _foreign(other)):
            raise ValueError(f"out={str(out)!r}: {other} is in the way, and holds no samples")
    _, before = _beside(path)
    if before.is_dir() and not path.exists():  # a save was killed between its two renames
        path = before
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    held = read_settings(path)
    if held is None:
        raise ValueError(f"out={str(out)!r} exists and holds no samples")
    if foreign := _foreign(path):
        raise ValueError(f"out={str(out)!r} holds {foreign}, which is not of its samples")
    differing = differences(held, settings)
    if differing:
        raise ValueError(f"out={str(out)!r} holds samples of other settings: {differing}")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a folder of samples, or in an .npz of them; None in anything else."""
    try:
        if path.is_dir():
            held = json.loads((path / SETTINGS).read_text())
        else:
            with np.load(path) as saved:
                held = json.loads(str(saved["settings"]))
    except (EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # not ours
        return None
    return held if isinstance(held, dict) else None


def differences(held: dict[str, Any], asked: dict[str, Any]) -> str:
    """ "steps: 10 -> 20, scale: 8.0 -> 4.0" of two settings; empty where they are the same.

    What models are called may differ, such as runs/a and runs/a/checkpoints/100: weights may not.
    """
    asked = json.loads(json.dumps(asked))
    return ", ".join(
        f"{name}: {held.get(name)} -> {asked.get(name)}"
        for name in sorted((held.keys() | asked.keys()) - {"model", "checkpoint", "classifier"})
        if held.get(name) != asked.get(name)
    )
