"""Samples: generated images with their labels, seeds and settings, and the files they go to."""

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
from jdm.errors import InvalidValue, first_ten
from jdm.files import is_system, local_path, write_whole
from jdm.sampling.labels import label_text

SETTINGS = "settings.json"
CAPTIONED = 100  # a grid of more images has no captions
PATHS = {"model", "checkpoint", "classifier"}  # the settings that are paths of models


@dataclasses.dataclass(frozen=True)
class Samples:
    """Generated images; shows itself as a grid in a notebook.

    images: uint8 [N, H, W, C]. labels: classes int32 [N] (-1: no guidance), probabilities float32
    [N, K], attributes int8 [N, K] (-1: not guided), or None. seeds: uint32 [N]. settings: the
    options and models that generated them. probabilities: p(label | image) by the given classifier
    or the model's own, float32 [N], NaN for an image without guidance; None without labels.
    trajectory: the estimates of x0 at every step, uint8 [steps, N, H, W, C], or None. class_names:
    of the model; () where they are unknown.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Num[np.ndarray, "n ..."] | None
    seeds: UInt32[np.ndarray, " n"]
    settings: dict[str, Any]
    probabilities: Float[np.ndarray, " n"] | None = None
    trajectory: UInt8[np.ndarray, "s n h w c"] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the images to a .png, .gif or .npz, or to a folder where the path has no suffix.

        .png: a grid. .gif: a grid of the trajectory (sample with trajectory=True). .npz: the arrays
        arr_0 (the images, as guided-diffusion's evaluator reads them), labels (-1: none), seeds,
        probabilities and settings. A folder: a PNG of each image, samples.csv and settings.json.

        The file or folder appears whole or not at all. Raises InvalidValue for another suffix, a
        .gif without a trajectory, and a folder that holds anything but samples of these settings.
        """
        path = Path(local_path("path", path))
        if suffix := check_format(path):
            write_whole(path, FORMATS[suffix](self))
        else:
            self._save_folder(path)

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
        """The grid, with each image's label and its probability below the image."""
        if self.labels is None or len(self) > CAPTIONED:
            return self._png()
        captions = []
        for label, probability in zip(self.labels, self._probabilities(), strict=True):
            known = "" if np.isnan(probability) else f" {probability:.0%}"
            captions.append(label_text(label, self.class_names) + known)
        return plot.captioned(self.images, captions, self._columns())

    def _png(self) -> bytes:
        return plot.png(self._grid(self.images))

    def _columns(self) -> int:
        return int(np.ceil(np.sqrt(len(self))))

    def _gif(self) -> bytes:
        if self.trajectory is None:
            said = "has nothing to show; a .gif needs trajectory=True"
            raise InvalidValue("trajectory", None, said)
        return plot.gif([self._grid(images) for images in self.trajectory])

    def _grid(self, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "high wide c"]:
        return plot.grid(images, self._columns())

    def _save_folder(self, path: Path) -> None:
        check_folder(path, self.settings)
        path = path.resolve()  # not the link, but the folder that it points to, is replaced
        partial, previous = _beside(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        rows = ["file,seed,label,probability"]
        for i, image in enumerate(self.images):
            name = f"{i:06}.png"
            (partial / name).write_bytes(plot.png(image, least_width=1))
            label = "" if self.labels is None else label_text(self.labels[i])
            rows.append(f"{name},{self.seeds[i]},{label},{self._probabilities()[i]:.6g}")
        (partial / "samples.csv").write_text("\n".join(rows) + "\n")
        (partial / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
        if path.is_dir():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        partial.rename(path)
        if previous.is_dir():
            shutil.rmtree(previous)


FORMATS = {".png": Samples._png, ".npz": Samples._npz, ".gif": Samples._gif}


def check_format(path: str | os.PathLike) -> str:
    """The suffix of a path that Samples can be saved to, "" for a folder. Raises InvalidValue."""
    suffix = Path(path).suffix
    if not Path(path).name:
        raise InvalidValue("out", str(path), "must name a file or a folder")
    if suffix and suffix not in FORMATS:
        allowed = f"must end in one of {', '.join(FORMATS)}, or be a folder"
        raise InvalidValue("out", str(path), allowed)
    return suffix


def _beside(path: Path) -> tuple[Path, Path]:
    """The temporary paths of the new folder, until it is whole, and of the folder it replaces."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.before")


def _foreign(folder: Path) -> str | None:
    """The first name in a folder that is not a file of samples, nor one that the system adds."""
    names = {p.name for p in folder.iterdir() if not is_system(p.name)}
    names -= {SETTINGS, "samples.csv"}
    return min((name for name in names if not re.fullmatch(r"\d{6,}\.png", name)), default=None)


def check_folder(path: Path, settings: dict[str, Any]) -> None:
    """Raises InvalidValue where a folder holds anything but samples of these settings."""
    out = path = path.resolve()

    def refuse(allowed: str):
        raise InvalidValue("out", str(out), allowed)

    if path.is_mount():
        refuse("is where a disk is mounted; name a folder in it")
    partial, previous = _beside(path)
    for other in (partial, previous):  # what a killed save left, which the next one removes
        if other.exists() and (not other.is_dir() or _foreign(other)):
            refuse(f"cannot be written: {other} is in the way, and holds no samples")
    if previous.is_dir() and not path.exists():  # a save was killed between its two renames
        path = previous
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    held = read_settings(path)
    if held is None:
        refuse("exists and holds no samples")
    elif foreign := _foreign(path):
        refuse(f"holds {foreign}, which is not one of its samples")
    elif differing := differences(held, settings):
        refuse(f"holds samples of other settings: {differing}")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a folder or .npz of samples; None where the path is neither."""
    try:
        if path.is_dir():
            held = json.loads((path / SETTINGS).read_text())
        else:
            with np.load(path) as saved:
                held = json.loads(str(saved["settings"]))
    except (EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # not samples
        return None
    return held if isinstance(held, dict) else None


def differences(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    """ "steps: 10 -> 20, scale: 8.0 -> 4.0" for two settings; "" where they are the same.

    The paths of the models are not compared; the digests of their weights are.
    """
    wanted = json.loads(json.dumps(wanted))
    differing = [
        f"{name}: {held.get(name)} -> {wanted.get(name)}"
        for name in sorted((held.keys() | wanted.keys()) - PATHS)
        if held.get(name) != wanted.get(name)
    ]
    return ", ".join(first_ten(differing))
