"""From a trained model to images: sample(), what is built on it, and the files of it.

request: what may be asked, checked. programs: compiled once, sized to memory. make: batches through
them. samples: what comes back, and its files. journey: interpolation, inversion, edits. runs: large
runs that can be interrupted, on one host or several. The maths is in jdm.diffusion.

Image i depends on seed i alone: each has a key of its own, batches are padded to one shape, and
the rows are split over the devices.
"""

import os
from collections.abc import Sequence

import numpy as np

from jdm.joint import Joint, named, opened
from jdm.sampling.journey import edit, interpolate, invert
from jdm.sampling.make import made
from jdm.sampling.request import Numbers, check
from jdm.sampling.samples import Samples, check_format

__all__ = ["Samples", "check", "check_format", "edit", "interpolate", "invert", "sample"]


def sample(
    joint: Joint | str | os.PathLike,
    n: int | None = None,
    *,
    labels: Numbers | None = None,
    seeds: Numbers | None = None,
    sampler: str = "ddim",
    steps: int | str = 50,
    spacing: str = "uniform",
    eta: float = 0.0,
    threshold: str = "static",
    guidance: str = "none",
    scale: float | None = None,
    scale_schedule: str = "constant",
    blocks: Sequence[str] | None = None,
    inner_steps: int = 1,
    classifier: Joint | str | os.PathLike | None = None,
    noise: np.ndarray | None = None,
    film: bool = False,
    batch_size: int | None = None,
) -> Samples:
    """Images of a trained model, one per seed.

    joint: a Joint, or the path of one. n: how many; where it is None, as many as there are seeds,
    or labels, or 1.
    labels: what guidance leans toward, as many as seeds, or one for all: classes in [0, K), None or
    -1 for an image that is not guided; or probabilities [N, K], rows that sum to 1; of a model that
    knows several labels attributes [N, K], 1 (on), 0 (off) or -1 (not asked for).
    seeds: integers in [0, 2**32); 0 … n - 1 where None. noise: x_T [N, H, W, C] to start from, in
    place of the seeds' own; they still seed what is drawn on the way.

    sampler: one of samplers.SAMPLERS. steps: how many of the T noise levels are visited, or how
    many of each section of them, such as "10,10,20". spacing: what they are even in, one of
    samplers.SPACINGS. eta: noise of ddim, in [0, 1]. threshold: how estimates of the clean image
    are held in [-1, 1], one of samplers.THRESHOLDS.

    guidance: one of guidance.GUIDANCE; all but "none" need labels. scale: of the guidance, finite;
    positive is toward the label; None is that guidance's default. scale_schedule: how it changes on
    the way, one of guidance.SCALE_SCHEDULES. blocks: which representations move, by name
    (nn.unet.block_names); None is all. inner_steps: in how many steps they do. classifier: whose
    classifier pixel guidance follows, trained on the same noise levels; None is the joint's own.

    film: whether the estimates on the way are kept. batch_size: the most images per device and
    call; None is as many as are of use. Either way no more than the device's memory holds.

    Raises ValueError, naming the argument, for anything out of range; MemoryError where not even
    one image for each device fits; FloatingPointError where a scale drives an image out of numbers.
    """
    model, joint = named(joint), opened(joint)
    if noise is not None:
        noise = _check_noise(joint, noise)
        n = len(noise) if n is None else n
    request = check(
        joint,
        n,
        labels=labels,
        seeds=seeds,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=eta,
        threshold=threshold,
        guidance=guidance,
        scale=scale,
        scale_schedule=scale_schedule,
        blocks=blocks,
        inner_steps=inner_steps,
        classifier=classifier,
        film=film,
        batch_size=batch_size,
    )
    if noise is not None:
        request = request.starting("noise", noise)
    return made(joint, request, request.settings(joint, model=model), batch_size)


def _check_noise(joint: Joint, noise: np.ndarray) -> np.ndarray:
    noise = np.asarray(noise)
    if noise.ndim != 4 or noise.shape[1:] != joint.image_shape:
        raise ValueError(
            f"noise has the shape {noise.shape}; this model takes [N, H, W, C] = "
            f"(N, {', '.join(map(str, joint.image_shape))})"
        )
    if not np.issubdtype(noise.dtype, np.floating) or not np.isfinite(noise).all():
        raise ValueError(f"noise must be finite floats, not {noise.dtype}")
    return noise.astype(np.float32)
