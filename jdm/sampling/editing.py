"""Interpolation between seeds, inversion of images to noise, and edits of images.

Interpolations and edits are ordinary requests that start from a given x_T or a given image.
"""

import functools
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jdm.diffusion.guidance import default_guidance
from jdm.diffusion.method import Method, method_of
from jdm.diffusion.process import to_floats
from jdm.diffusion.samplers import SAMPLERS, initial_noise
from jdm.errors import NO_VALUE, InvalidValue
from jdm.joint import Joint, as_joint, check_images, image_shape, name_of
from jdm.mesh import on_devices, replicated, whole
from jdm.numerics import fixed_flags, key_of
from jdm.options import POSITIVE, SHARE, Option, Rule
from jdm.sampling import programs
from jdm.sampling.generate import generate
from jdm.sampling.labels import Numbers, whole_numbers
from jdm.sampling.request import check_request, from_noise
from jdm.sampling.samples import Samples
from jdm.tracking import Progress

_ITERATIONS, _STRENGTH = Option(1, "", POSITIVE), Option(1.0, "", SHARE)
_POINTS = Option(2, "", Rule("at least 2: both ends are included", lambda n: n >= 2))


@fixed_flags()
def interpolate(
    joint: Joint | str | os.PathLike,
    seeds: Numbers,
    n: int = 8,
    *,
    label: Any = None,
    classifier: Joint | str | os.PathLike | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Samples:
    """n images on a path from the image of one seed to that of another, both included.

    x_T is interpolated spherically between the noise of the two seeds, which keeps its norm (Song
    et al. 2021, section 5.3). Sampling must be deterministic: sampler ddim with eta=0, dpmpp_2m or
    heun. label: the label of all images. classifier, batch_size, options: see `jdm.sample`. Each
    entry of the result's `seeds` is the seed at the nearer end of the path.

    Raises InvalidValue, naming the argument.
    """
    path, joint = name_of(joint), as_joint(joint)
    method = from_noise(method_of(None, options))
    _POINTS.check("n", n)
    seeds = whole_numbers("seeds", seeds)
    if len(seeds) != 2:
        raise InvalidValue("seeds", NO_VALUE, f"are {len(seeds)}; interpolation is between 2")
    if SAMPLERS[method.sampler].draws_noise(method):
        known = ", ".join(name for name, one in SAMPLERS.items() if not one.draws_noise(Method()))
        allowed = f"draws noise at every step; interpolation needs {known}, with eta=0"
        raise InvalidValue("sampler", method.sampler, allowed)
    shares = np.linspace(0, 1, n)
    request = check_request(
        joint,
        n,
        method=method,
        labels=None if label is None else [label],
        seeds=[seeds[0] if share < 0.5 else seeds[1] for share in shares],
        classifier=classifier,
        batch_size=batch_size,
    )
    ends = request.seeds[[0, -1]]
    first, last = np.asarray(_noise(joint.model, joint.diffusion, ends))
    request = request.starting("noise", _arc(first, last, shares))
    return generate(joint, request, batch_size, model=path, interpolate=ends.tolist())


@fixed_flags()
def invert(
    joint: Joint | str | os.PathLike,
    images: Any,
    *,
    labels: Numbers | None = None,
    iterations: int = 5,
    batch_size: int | None = None,
    steps: int | str = 100,
    spacing: str = "uniform",
    guidance: str = "none",
    scale: float | None = None,
) -> Float[np.ndarray, "n h w c"]:
    """The noise x_T, float32 [N, H, W, C], from which ddim generates the given images.

    images: uint8 [N, H, W, C], or floats in [-1, 1], see `jdm.classify`. To get the images back:
    jdm.sample(joint, noise=x_T, steps=steps, spacing=spacing, threshold="none"), with the same
    guidance. iterations: fixed-point iterations in each step, see samplers.ddim_inverse. For the
    rest see `jdm.sample`.

    Raises InvalidValue, naming the argument; MemoryError where not even one image for each device
    fits.
    """
    joint = as_joint(joint)
    images = np.asarray(to_floats(check_images(joint, images, least=1)))
    _ITERATIONS.check("iterations", iterations)
    method = method_of(None, dict(guidance=guidance, scale=scale, steps=steps, spacing=spacing))
    request = check_request(joint, len(images), method=method, labels=labels, batch_size=batch_size)
    mesh = joint.mesh
    static = (joint.model, joint.diffusion, request.recipe.method, iterations, mesh)
    compiled = functools.partial(programs.compile_inverter, *static)
    rows, program = programs.fitting(len(images), mesh, batch_size, compiled)
    once = (whole(joint.weights), np.float32(request.scale))
    weights, scale = jax.device_put(once, replicated(mesh))
    noise = []
    with Progress(len(images), "inverting", "images") as progress:
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            inputs = on_devices((images[part], request.targets[part]), rows, mesh)
            noise.append(np.asarray(program(weights, *inputs, scale))[: len(images[part])])
            progress.advance(len(noise[-1]))
    return np.concatenate(noise)


@fixed_flags()
def edit(
    joint: Joint | str | os.PathLike,
    images: Any,
    labels: Numbers | None,
    *,
    strength: float = 0.5,
    steps: int | str | None = None,
    guidance: str | None = None,
    seeds: Numbers | None = None,
    classifier: Joint | str | os.PathLike | None = None,
    batch_size: int | None = None,
    trajectory: bool = False,
    **options: Any,
) -> Samples:
    """The images, noised up to a noise level and denoised toward labels (Meng et al. 2022, SDEdit).

    images: uint8 [N, H, W, C], or floats in [-1, 1], see `jdm.classify`. strength: that noise
    level as a share of T, in (0, 1]; at 1 nothing of the images is left. steps: denoising steps;
    None is 50 * strength. guidance: None is what `jdm.sample` chooses for labels. For the rest see
    `jdm.sample`.

    Raises InvalidValue, naming the argument.
    """
    path, joint = name_of(joint), as_joint(joint)
    images = check_images(joint, images, least=1)
    _STRENGTH.check("strength", strength)
    total = max(1, round(strength * joint.diffusion.steps))
    steps = min(total, max(1, round(50 * strength))) if steps is None else steps
    if guidance is None:
        guidance = default_guidance(True, classifier is not None)
    request = check_request(
        joint,
        len(images),
        method=method_of(None, dict(steps=steps, guidance=guidance) | options),
        labels=labels,
        seeds=seeds,
        classifier=classifier,
        total=total,
        trajectory=trajectory,
        batch_size=batch_size,
    )
    request = request.starting("image", np.asarray(to_floats(images)))
    return generate(joint, request, batch_size, model=path, strength=float(strength))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noise(model, diffusion, seeds):
    """x_T of the seeds, float32 [N, H, W, C]."""
    return initial_noise(diffusion, key_of(seeds), image_shape(model))


def _arc(first: np.ndarray, last: np.ndarray, shares: np.ndarray) -> Float[np.ndarray, "n h w c"]:
    """Spherical interpolation from one array to another, at these shares of their angle."""
    a, b = first.ravel(), last.ravel()
    angle = np.arccos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
    if np.sin(angle) < 1e-6:  # the same seed twice
        return np.broadcast_to(first, (len(shares), *first.shape)).astype(np.float32)
    factors = np.stack([np.sin((1 - shares) * angle), np.sin(shares * angle)]) / np.sin(angle)
    return np.tensordot(factors.T, np.stack([first, last]), axes=1).astype(np.float32)
