"""sample(): images from a trained model; Samples: what comes back.

Owns batches, seeds, labels, devices and files. The maths is in jdm.diffusion.

Image i depends on seed i alone: each has a key of its own, batches are padded to one shape, and
the rows are split over the devices.
"""

import dataclasses
import functools
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8, UInt32

from jdm import plot
from jdm.diffusion.guidance import DEFAULT_SCALES, GUIDANCE
from jdm.diffusion.process import float_to_pixels, pick
from jdm.diffusion.samplers import SAMPLERS, timesteps
from jdm.diffusion.samplers import sample as run_sampler
from jdm.files import write_whole
from jdm.joint import Joint, judged_by, make_network, named, opened
from jdm.mesh import by_row, make_mesh
from jdm.tracking import Progress

FORMATS = (".png", ".npz")
Numbers = Sequence | np.ndarray  # what they must hold is checked, and said in one sentence


@dataclasses.dataclass(frozen=True)
class Samples:
    """Generated images; shows itself as a grid in a notebook.

    images: uint8 [N, H, W, C]. labels: the asked classes, int32 [N], or None. seeds: [N].
    settings: how they were made.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"] | None
    seeds: UInt32[np.ndarray, " n"]
    settings: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Writes a grid (.png), or arrays images, labels (-1 = none), seeds and settings (.npz).

        The file appears whole or not at all. Raises ValueError for another ending.
        """
        path = Path(path)
        if check_format(path) == ".png":
            content = self._repr_png_()
        else:
            labels = np.full(len(self.seeds), -1) if self.labels is None else self.labels
            buffer = io.BytesIO()
            np.savez_compressed(
                buffer,
                images=self.images,
                labels=labels.astype(np.int32),
                seeds=self.seeds,
                settings=json.dumps(self.settings),
            )
            content = buffer.getvalue()
        write_whole(path, content)

    def _repr_png_(self) -> bytes:
        columns = int(np.ceil(np.sqrt(len(self.images))))
        return plot.png(plot.grid(self.images, columns))


def check_format(path: str | os.PathLike) -> str:
    """The ending of a file that Samples can be saved to; ValueError for any other."""
    ending = Path(path).suffix
    if ending not in FORMATS:
        raise ValueError(f"out={str(path)!r} must end in one of {', '.join(FORMATS)}")
    return ending


def sample(
    joint: Joint | str | os.PathLike,
    n: int | None = None,
    *,
    labels: Numbers | None = None,
    seeds: Numbers | None = None,
    sampler: str = "ddim",
    steps: int | str = 50,
    guidance: str = "none",
    scale: float | None = None,
    eta: float = 0.0,
    clip: bool = True,
    classifier: Joint | str | os.PathLike | None = None,
    batch_size: int = 64,
) -> Samples:
    """Images of a trained model, one per seed.

    joint: a Joint, or the path of one. n: how many; where it is None, as many as there are seeds,
    or labels, or 1. labels: classes in [0, K), as many as seeds, or one for all. seeds: integers
    in [0, 2**32); 0 … n - 1 where None. sampler: one of samplers.SAMPLERS. steps: how many of the
    T noise levels are visited, or how many of each section of them, such as "10,10,20" (see
    samplers.timesteps). guidance: one of guidance.GUIDANCE; all but "none" need labels. scale: of
    the guidance, finite; positive is toward the class; None is that guidance's default. eta: noise
    of ddim. clip: hold every estimate of the clean image in [-1, 1]. classifier: whose classifier
    pixel guidance follows, trained on the same noise levels; None is the joint's own. batch_size:
    images per device and call.

    Raises ValueError, naming the argument, for anything out of range.
    """
    joint = opened(joint)
    judge = None if classifier is None else opened(classifier)
    labels, seeds, settings = check(
        joint,
        n,
        classifier=judge,
        labels=labels,
        seeds=seeds,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        scale=scale,
        eta=eta,
        clip=clip,
        batch_size=batch_size,
    )
    settings["classifier"] = named(classifier)
    if guidance == "none" and labels is not None:
        warnings.warn(
            "labels are given, but guidance='none' does not use them; "
            f"known guidance: {', '.join(GUIDANCE)}",
            stacklevel=2,
        )
    static = tuple(settings[key] for key in ("sampler", "steps", "guidance", "eta", "clip"))
    sharding = by_row(make_mesh())
    rows = batch_size * sharding.mesh.size
    if len(seeds) < rows:  # few images: the next power of two, so that few shapes are compiled
        rows = sharding.mesh.size * 2 ** int(
            np.ceil(np.log2(max(1, len(seeds) / sharding.mesh.size)))
        )
    asked = np.zeros(len(seeds), np.int32) if labels is None else labels
    images = []
    with Progress(len(seeds), "sampling", "images") as progress:
        for start in range(0, len(seeds), rows):
            part = slice(start, min(start + rows, len(seeds)))
            count = part.stop - part.start
            batch = [jax.device_put(_pad(x[part], rows), sharding) for x in (seeds, asked)]
            made = _generate(
                joint.model,
                judge and judge.model,
                joint.diffusion,
                static,
                (joint.weights, judge and judge.weights),
                *batch,
                settings["scale"],
            )
            images.append(np.asarray(made)[:count])
            progress.advance(count)
    return Samples(np.concatenate(images), labels, seeds, settings)


def check(
    joint: Joint,
    n: int | None = None,
    *,
    labels: Numbers | None,
    seeds: Numbers | None,
    sampler: str,
    steps: int | str,
    guidance: str,
    scale: float | None,
    eta: float,
    clip: bool,
    batch_size: int,
    classifier: Joint | None = None,
) -> tuple[np.ndarray | None, np.ndarray, dict[str, Any]]:
    """(labels int32 [N] or None, seeds uint32 [N], settings) of a request, before any work.

    Raises ValueError, in one sentence that begins with the argument's name.
    """
    labels, seeds = _rows(joint, n, labels, seeds)
    pick("sampler", sampler, SAMPLERS)
    pick("guidance", guidance, GUIDANCE)
    timesteps(joint.diffusion.steps, steps)
    scale = DEFAULT_SCALES[guidance] if scale is None else float(scale)
    if not np.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if guidance != "none" and joint.model.multi_label:
        raise ValueError(f"guidance={guidance!r} is toward one class; this model is multi-label")
    if guidance != "none" and labels is None:
        raise ValueError(f"guidance={guidance!r} needs labels")
    if classifier is not None:
        _check_classifier(joint, classifier, guidance)
    settings = dict(
        sampler=sampler, steps=steps, guidance=guidance, scale=scale, eta=eta, clip=clip
    )
    return labels, seeds, settings


def _check_classifier(joint: Joint, classifier: Joint, guidance: str) -> None:
    """Raises ValueError where a classifier cannot judge what the joint makes."""
    if guidance != "pixel":
        raise ValueError(f"classifier goes with guidance='pixel', not with {guidance!r}")
    for name, ours, theirs in (
        ("images of the shape", joint.image_shape, classifier.image_shape),
        ("classes", joint.model.num_classes, classifier.model.num_classes),
        (
            "the schedule",
            (joint.diffusion.schedule, joint.diffusion.steps),
            (classifier.diffusion.schedule, classifier.diffusion.steps),
        ),
    ):
        if ours != theirs:
            raise ValueError(f"classifier knows {name} {theirs}; this model has {ours}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model, judge, diffusion, settings, weights, seeds, labels, scale):
    """uint8 images of one batch: the one program of a (shape, sampler, steps, guidance)."""
    sampler, steps, guidance, eta, clip = settings
    network = make_network(model, diffusion, weights[0])
    if judge is not None:
        network = judged_by(network, make_network(judge, diffusion, weights[1]))
    eps_fn = GUIDANCE[guidance](network, diffusion, labels, scale)
    keys = jax.vmap(jax.random.key)(seeds)
    shape = (model.image_size, model.image_size, model.image_channels)
    x = run_sampler(
        eps_fn, diffusion, keys, shape, sampler=sampler, steps=steps, eta=eta, clip=clip
    )
    return float_to_pixels(x)


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    """The last row again and again, up to `rows`."""
    return np.pad(x, (0, rows - len(x)), mode="edge")


def _rows(joint: Joint, n, labels, seeds) -> tuple[np.ndarray | None, np.ndarray]:
    """(labels int32 [N] or None, seeds uint32 [N]), checked and brought to one length."""
    classes = joint.model.num_classes
    if labels is not None:
        labels = _whole_numbers("labels", labels)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if wrong.size:
            raise ValueError(
                f"labels hold {wrong[0]}; this model knows the classes 0 to {classes - 1}"
            )
    if seeds is not None:
        seeds = _whole_numbers("seeds", seeds)
        wrong = seeds[(seeds < 0) | (seeds >= 2**32)]
        if wrong.size:
            raise ValueError(f"seeds hold {wrong[0]}; they must lie in [0, 2**32)")
    if n is None:
        n = next((len(x) for x in (seeds, labels) if x is not None), 1)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    seeds = np.arange(n) if seeds is None else seeds
    if len(seeds) != n:
        raise ValueError(f"seeds are {len(seeds)} for n={n} images; there must be as many")
    if labels is not None:
        if len(labels) not in (1, n):
            raise ValueError(f"labels are {len(labels)} for {n} images; 1 or {n} is allowed")
        labels = np.broadcast_to(labels, (n,)).astype(np.int32)
    return labels, seeds.astype(np.uint32)


def _whole_numbers(name: str, values) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{name} must be a list of whole numbers, not {values.dtype}{values.shape}"
        )
    return values
