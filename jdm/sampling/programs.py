"""The compiled programs, and how many images go into one call of them.

One program of a (shape, method, model) is compiled ahead of time, so that its own account of the
memory it needs can be read before anything runs; it is kept for later calls.
"""

import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdm.diffusion.guidance import block_mask, guide
from jdm.diffusion.process import Diffusion, float_to_pixels, pixels_to_float
from jdm.diffusion.samplers import ddim_inverse, image_noise, initial_noise, reverse, timesteps
from jdm.joint import abstract_weights, answers_of, judged_by, make_network
from jdm.mesh import by_row, replicated
from jdm.nn.model import JointModel
from jdm.nn.unet import block_names
from jdm.sampling.request import Method

# Images per device and call where memory allows for more. On a CPU nothing gets faster past this;
# elsewhere that was not measured.
MOST = {"cpu": 64}
MOST_ELSEWHERE = 512
SHARE = 0.9  # of the memory that is free, left to the program


def _generate(model, judge, diffusion, method, weights, seeds, targets, scale, given):
    """(uint8 images [B, H, W, C], those estimated on the way [steps, B, H, W, C] or None, whether
    every pixel of an image is a number [B])."""
    network = make_network(model, diffusion, weights[0])
    if judge is not None:
        network = judged_by(network, make_network(judge, diffusion, weights[1]))
    eps_fn = guide(
        network,
        diffusion,
        method.guidance,
        targets,
        scale,
        schedule=method.scale_schedule,
        blocks=block_mask(block_names(len(model.multipliers), model.blocks), method.blocks),
        inner_steps=method.inner_steps,
    )
    keys = jax.vmap(jax.random.key)(seeds)
    times = timesteps(diffusion, method.steps, method.spacing, method.total)
    start = STARTS[method.start](diffusion, keys, image_shape(model), times[0], given)
    x, film = reverse(
        eps_fn,
        diffusion,
        start,
        keys,
        times,
        sampler=method.sampler,
        eta=method.eta,
        threshold=method.threshold,
        film=method.film,
    )
    finite = jnp.isfinite(x).all(axis=(1, 2, 3))
    return float_to_pixels(x), None if film is None else float_to_pixels(film), finite


def _noised(diffusion: Diffusion, keys, shape, time, images):
    t = jnp.full(images.shape[:1], time)
    return diffusion.q_sample(images, t, image_noise(keys, diffusion.steps, shape))


# The first x, by Method.start: (diffusion, keys, shape, first time, what was given) -> x.
STARTS: dict[str, Callable] = {
    "seed": lambda diffusion, keys, shape, time, given: initial_noise(diffusion, keys, shape),
    "noise": lambda diffusion, keys, shape, time, given: given,
    "image": _noised,
}


def _invert(model, diffusion, method, iterations, weights, images, targets, scale):
    """x_T [B, H, W, C] of images, float32 in [-1, 1]."""
    network = make_network(model, diffusion, weights)
    eps_fn = guide(network, diffusion, method.guidance, targets, scale)
    times = timesteps(diffusion, method.steps, method.spacing)
    return ddim_inverse(eps_fn, diffusion, images, times, iterations)


@functools.partial(jax.jit, static_argnums=0)
def likelihood(model: JointModel, weights, images, targets):
    """p(target | image) [B] of clean uint8 images: the product of the answers' probabilities."""
    t = jnp.zeros(images.shape[:1], jnp.int32)
    return jnp.exp((targets * answers_of(model, weights, pixels_to_float(images), t)).sum(axis=1))


def image_shape(model: JointModel) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (model.image_size, model.image_size, model.image_channels)


@functools.cache
def generate(
    model: JointModel,
    judge: JointModel | None,
    diffusion: Diffusion,
    method: Method,
    mesh: Mesh,
    rows: int,
) -> jax.stages.Compiled:
    """The program of a batch of `rows` over the mesh.

    ((weights, judge's weights), seeds, targets, scale, given) -> see `_generate`.
    """
    whole, (images, targets, scale) = replicated(mesh), _asked(model, mesh, rows)
    lowered = jax.jit(_generate, static_argnums=(0, 1, 2, 3)).lower(
        model,
        judge,
        diffusion,
        method,
        (abstract_weights(model, whole), judge and abstract_weights(judge, whole)),
        jax.ShapeDtypeStruct((rows,), jnp.uint32, sharding=by_row(mesh)),
        targets,
        scale,
        None if method.start == "seed" else images,
    )
    return lowered.compile()


@functools.cache
def invert(
    model: JointModel,
    diffusion: Diffusion,
    method: Method,
    iterations: int,
    mesh: Mesh,
    rows: int,
) -> jax.stages.Compiled:
    """The program that takes a batch of `rows` images over the mesh back to their noise.

    (weights, images float32, targets, scale) -> x_T float32 [B, H, W, C].
    """
    lowered = jax.jit(_invert, static_argnums=(0, 1, 2, 3)).lower(
        model,
        diffusion,
        method,
        iterations,
        abstract_weights(model, replicated(mesh)),
        *_asked(model, mesh, rows),
    )
    return lowered.compile()


def _asked(model: JointModel, mesh: Mesh, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of images, targets and scale of a batch of `rows`, laid out as programs want."""
    by, answers = by_row(mesh), model.num_classes * (2 if model.multi_label else 1)
    return (
        jax.ShapeDtypeStruct((rows, *image_shape(model)), jnp.float32, sharding=by),
        jax.ShapeDtypeStruct((rows, answers), jnp.float32, sharding=by),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)),
    )


def pad(x: np.ndarray, rows: int) -> np.ndarray:
    """The last row again and again, up to `rows`."""
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1), mode="edge")


@functools.cache  # XLA takes tens of milliseconds to answer, each time
def needed(program: Any) -> int:
    """Bytes that a program takes on each device, by its own account; 0 where it gives none."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return sum(sizes)


def free_memory(device: jax.Device) -> int:
    """Bytes that a program may take on a device. Of a CPU: half of the machine's, or of the group
    of processes it is confined to, shared among the devices that XLA divides it into."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    confined = Path("/sys/fs/cgroup/memory.max")
    if confined.is_file() and (limit := confined.read_text().strip()).isdecimal():
        total = min(total, int(limit))
    return total // 2 // len(jax.local_devices())


def fitting(
    n: int, mesh: Mesh, batch_size: int | None, compiled: Callable[[int], Any]
) -> tuple[int, Any]:
    """(rows of a batch, its program): the most that fit, of what is asked for.

    n: images in all; few are rounded up to a power of two, so that few shapes are compiled.
    batch_size: the most for each device; None is as many as are of use. compiled: rows -> program.

    Raises MemoryError where not even one image for each device fits.
    """

    def compiles(rows: int) -> tuple[Any, int | float]:
        try:
            program = compiled(rows)
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what does not fit
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, math.inf
        return program, needed(program)

    devices, device = mesh.size, mesh.devices.flat[0]
    most = batch_size or MOST.get(device.platform, MOST_ELSEWHERE)
    each = min(most, 2 ** math.ceil(math.log2(max(1, n / devices))))
    while True:
        program, need = compiles(each * devices)
        free = free_memory(device)
        if need <= free:
            return each * devices, program
        needs = "more than there is" if need == math.inf else f"{need / 2**20:,.0f} MiB"
        if each == 1:
            raise MemoryError(
                f"batch_size=1 needs {needs} on each device, and only "
                f"{free / 2**20:,.0f} MiB are free"
            )
        # A power of two: what is free changes from call to call, and what is compiled should not.
        fewer = each // 2 if need == math.inf else int(each * free / need)
        fewer = 2 ** int(math.log2(max(1, min(each // 2, fewer))))
        print(
            f"{each} images a device would need {needs}, and {free / 2**20:,.0f} MiB are free: "
            f"{fewer} at a time",
            file=sys.stderr,
        )
        each = fewer
