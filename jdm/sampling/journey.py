"""Between two seeds, from an image to its noise and back, and from an image part of the way.

Owns where a journey starts; each is then a request like any other.
"""

import dataclasses
import functools
import os
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jdm.diffusion.process import pixels_to_float
from jdm.diffusion.samplers import initial_noise
from jdm.joint import Joint, check_images, named, opened
from jdm.mesh import by_row, local_mesh, replicated
from jdm.sampling import programs
from jdm.sampling.make import made
from jdm.sampling.request import Method, Numbers, check, check_numbers, whole_numbers
from jdm.sampling.samples import Samples
from jdm.tracking import Progress

# The arguments of jdm.sample that say how, which a journey hands on.
OPTIONS = {field.name for field in dataclasses.fields(Method)} - {"start", "total"}
OPTIONS |= {"scale", "classifier"}


def interpolate(
    joint: Joint | str | os.PathLike,
    seeds: Numbers,
    n: int = 8,
    *,
    label: Any = None,
    batch_size: int | None = None,
    **options: Any,
) -> Samples:
    """n images on the way from one seed's to another's, both included.

    The noise x_T goes from one to the other along the arc between them, so that it is as long on
    the way as at the ends (Song et al. 2021, section 5.3). Every step from there must be
    deterministic: sampler ddim with eta=0, dpmpp_2m or heun. label: of all of them; options: as
    those of `jdm.sample`. The seeds of the samples are the ones they are nearer to.

    Raises ValueError, naming the argument, for anything out of range.
    """
    model, joint = named(joint), opened(joint)
    check_numbers(Integral, n=n)
    _check_options("interpolate", options)
    seeds = whole_numbers("seeds", seeds)
    if len(seeds) != 2:
        raise ValueError(f"seeds are {len(seeds)}; the way is between 2")
    if n < 2:
        raise ValueError(f"n={n} must be at least 2: both ends are included")
    if options.get("sampler") == "ancestral" or options.get("eta"):
        raise ValueError("sampler must be deterministic: ddim with eta=0, dpmpp_2m or heun")
    way = np.linspace(0, 1, n)
    request = check(
        joint,
        n,
        labels=None if label is None else [label],
        seeds=[seeds[0] if share < 0.5 else seeds[1] for share in way],
        batch_size=batch_size,
        **options,
    )
    ends = _noise(joint.model, joint.diffusion, request.seeds[[0, -1]])
    request = request.starting("noise", _arc(*np.asarray(ends), way))
    ends = [int(seed) for seed in request.seeds[[0, -1]]]
    settings = request.settings(joint, model=model, interpolate=ends)
    return made(joint, request, settings, batch_size)


def invert(
    joint: Joint | str | os.PathLike,
    images: Any,
    *,
    labels: Numbers | None = None,
    guidance: str = "none",
    scale: float | None = None,
    steps: int | str = 100,
    spacing: str = "uniform",
    iterations: int = 5,
    batch_size: int | None = None,
) -> Float[np.ndarray, "n h w c"]:
    """The noise x_T, float32 [N, H, W, C], from which ddim comes back to the images.

    images: uint8 [N, H, W, C], or floats in [-1, 1]. To come back: jdm.sample(joint, noise=x_T,
    steps=steps, spacing=spacing, threshold="none"), with the same guidance. iterations: how often
    each step is solved anew, see samplers.ddim_inverse. batch_size: as that of `jdm.sample`.

    Raises ValueError, naming the argument, for anything out of range; MemoryError where not even
    one image for each device fits.
    """
    joint = opened(joint)
    images = check_images(joint, images)
    _check_some(images)
    check_numbers(Integral, iterations=iterations)
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    options = dict(guidance=guidance, scale=scale, steps=steps, spacing=spacing)
    request = check(joint, len(images), labels=labels, batch_size=batch_size, **options)
    mesh = local_mesh()
    static = (joint.model, joint.diffusion, request.method, iterations, mesh)
    compiled = functools.partial(programs.invert, *static)
    rows, program = programs.fitting(len(images), mesh, batch_size, compiled)
    fixed = (joint.weights, np.float32(request.scale))
    weights, scale = jax.device_put(fixed, replicated(mesh))
    noise, asked = [], (np.asarray(_floats(images)), request.targets)
    with Progress(len(images), "inverting", "images") as progress:
        for start in range(0, len(images), rows):
            batch, targets = (x[start : start + rows] for x in asked)
            padded = (jax.device_put(programs.pad(x, rows), by_row(mesh)) for x in (batch, targets))
            noise.append(np.asarray(program(weights, *padded, scale))[: len(batch)])
            progress.advance(len(batch))
    return np.concatenate(noise)


def edit(
    joint: Joint | str | os.PathLike,
    images: Any,
    labels: Numbers | None,
    *,
    strength: float = 0.5,
    steps: int | str | None = None,
    guidance: str = "representation",
    seeds: Numbers | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Samples:
    """The images, noised part of the way and denoised toward labels (Meng et al. 2022, SDEdit).

    images: uint8 [N, H, W, C], or floats in [-1, 1]. strength: how much of the chain they go up, in
    (0, 1]; at 1 nothing of them is left. steps: on the way back; as many of the default 50 as the
    strength leaves, where None. labels, seeds, options: as those of `jdm.sample`.

    Raises ValueError, naming the argument, for anything out of range.
    """
    model, joint = named(joint), opened(joint)
    images = check_images(joint, images)
    _check_some(images)
    check_numbers(Real, strength=strength)
    _check_options("edit", options)
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1]")
    total = max(1, round(strength * joint.diffusion.steps))
    steps = min(total, max(1, round(50 * strength))) if steps is None else steps
    request = check(
        joint,
        len(images),
        labels=labels,
        seeds=seeds,
        guidance=guidance,
        steps=steps,
        total=total,
        batch_size=batch_size,
        **options,
    )
    request = request.starting("image", np.asarray(_floats(images)))
    settings = request.settings(joint, model=model, strength=float(strength))
    return made(joint, request, settings, batch_size)


def _check_options(function: str, options: dict[str, Any]) -> None:
    """Raises TypeError for what is none of jdm.sample's, or what the journey itself decides."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def _check_some(images: np.ndarray) -> None:
    """Raises ValueError where there is no image to start from."""
    if not len(images):
        raise ValueError("images are none; there must be at least 1")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noise(model, diffusion, seeds):
    """x_T of the seeds, float32 [N, H, W, C]."""
    return initial_noise(diffusion, jax.vmap(jax.random.key)(seeds), programs.image_shape(model))


def _floats(images: np.ndarray) -> Float[jax.Array, "n h w c"]:
    x = jnp.asarray(images)
    return pixels_to_float(x) if x.dtype == jnp.uint8 else x


def _arc(first: np.ndarray, last: np.ndarray, way: np.ndarray) -> Float[np.ndarray, "n h w c"]:
    """Points on the arc from one array to another, at these shares of the angle between them."""
    a, b = first.ravel(), last.ravel()
    cosine = np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-6:  # the same seed twice
        return np.broadcast_to(first, (len(way), *first.shape)).astype(np.float32)
    shares = np.stack([np.sin((1 - way) * angle), np.sin(way * angle)]) / np.sin(angle)
    return np.tensordot(shares.T, np.stack([first, last]), axes=1).astype(np.float32)
