"""The compiled programs, and the number of images in one call of a program.

A program is compiled ahead of time, so that the memory it needs is known before it runs. It is
compiled once for each combination of model, recipe and shapes, and kept for later calls.
"""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdm.diffusion.guidance import Network, guide, log_probabilities_of
from jdm.diffusion.method import Method
from jdm.diffusion.process import Diffusion, float_to_pixels, pixels_to_float
from jdm.diffusion.samplers import ddim_inverse, image_noise, initial_noise, reverse, timesteps
from jdm.joint import abstract_weights, image_shape, logits_of, make_network
from jdm.mesh import by_row, replicated
from jdm.messages import say
from jdm.nn.model import JointModel
from jdm.numerics import key_of
from jdm.sampling.request import Recipe

# The default upper bound on images per device and call. On a CPU larger batches are no faster; the
# bound for accelerators was not measured.
MOST = {"cpu": 64}
MOST_ELSEWHERE = 512
SHARE = 0.9  # the fraction of an accelerator's free memory that a program may use


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(model, classifier, diffusion, recipe, weights, seeds, targets, scale, given):
    """(images, uint8 [B, H, W, C]; the estimates of x0 at every step, uint8 [steps, B, H, W, C], or
    None; whether all pixels of an image are finite [B])."""
    network = make_network(model, diffusion, weights[0])
    if classifier is not None:
        network = _with_classifier(network, make_network(classifier, diffusion, weights[1]))
    method = recipe.method
    eps_fn = guide(network, diffusion, method, targets, scale)
    keys = key_of(seeds)
    times = timesteps(diffusion, method.steps, method.spacing, recipe.total)
    start = STARTS[recipe.start](diffusion, keys, image_shape(model), times[0], given)
    x, trajectory = reverse(eps_fn, diffusion, start, keys, times, method, recipe.trajectory)
    finite = jnp.isfinite(x).all(axis=(1, 2, 3))
    return float_to_pixels(x), None if trajectory is None else float_to_pixels(trajectory), finite


def _with_classifier(network: Network, classifier: Network) -> Network:
    """The network with another one's classifier. `classifier` encodes x_t with its own encoder."""
    return Network(
        encode=lambda x, t: (network.encode(x, t), classifier.encode(x, t)),
        decode=lambda features, x, t: network.decode(features[0], x, t),
        log_probabilities=lambda features, t: classifier.log_probabilities(features[1], t),
        block_names=(network.block_names, classifier.block_names),
    )


def _noised(diffusion: Diffusion, keys, shape, time, images):
    t = jnp.full(images.shape[:1], time)
    return diffusion.q_sample(images, t, image_noise(keys, diffusion.steps, shape))


# What sampling starts from, by Recipe.start: (diffusion, keys, shape, first timestep, given) -> x.
STARTS: dict[str, Callable] = {
    "seed": lambda diffusion, keys, shape, time, given: initial_noise(diffusion, keys, shape),
    "noise": lambda diffusion, keys, shape, time, given: given,
    "image": _noised,
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _invert(model, diffusion, method, iterations, weights, images, targets, scale):
    """x_T [B, H, W, C] of images, float32 in [-1, 1]."""
    network = make_network(model, diffusion, weights)
    eps_fn = guide(network, diffusion, method, targets, scale)
    times = timesteps(diffusion, method.steps, method.spacing)
    return ddim_inverse(eps_fn, diffusion, images, times, iterations)


@functools.partial(jax.jit, static_argnums=0)
def likelihood(model: JointModel, weights, images, targets):
    """p(label | image) [B] for clean uint8 images; with attributes, the product over them."""
    t = jnp.zeros(images.shape[:1], jnp.int32)
    logits = logits_of(model, weights, pixels_to_float(images), t)
    return jnp.exp((targets * log_probabilities_of(logits, model.multi_label)).sum(axis=1))


@functools.cache
def compile_sampler(*what: Any) -> jax.stages.Compiled:
    """The compiled program of `trace_sampler`, which has the same arguments."""
    return trace_sampler(*what).lower().compile()


def trace_sampler(
    model: JointModel,
    classifier: JointModel | None,
    diffusion: Diffusion,
    recipe: Recipe,
    mesh: Mesh,
    rows: int,
) -> jax.stages.Traced:
    """The sampling program for a batch of `rows` images, split over the mesh.

    ((weights, guidance classifier's weights), seeds, targets, scale, given) -> see `_sample`.
    """
    images, targets, scale = _abstract_inputs(model, mesh, rows)
    weights = (abstract_weights(model, mesh), classifier and abstract_weights(classifier, mesh))
    seeds = jax.ShapeDtypeStruct((rows,), jnp.uint32, sharding=by_row(mesh))
    given = None if recipe.start == "seed" else images
    inputs = (weights, seeds, targets, scale, given)
    return _sample.trace(model, classifier, diffusion, recipe, *inputs)


@functools.cache
def compile_inverter(
    model: JointModel, diffusion: Diffusion, method: Method, iterations: int, mesh: Mesh, rows: int
) -> jax.stages.Compiled:
    """The program that inverts a batch of `rows` images, split over the mesh.

    (weights, images float32, targets, scale) -> x_T float32 [B, H, W, C].
    """
    inputs = (abstract_weights(model, mesh), *_abstract_inputs(model, mesh, rows))
    return _invert.lower(model, diffusion, method, iterations, *inputs).compile()


def _abstract_inputs(model: JointModel, mesh: Mesh, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(images, targets, scale) of a batch of `rows`, as shapes."""
    by, targets = by_row(mesh), model.num_classes * (2 if model.multi_label else 1)
    return (
        jax.ShapeDtypeStruct((rows, *image_shape(model)), jnp.float32, sharding=by),
        jax.ShapeDtypeStruct((rows, targets), jnp.float32, sharding=by),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)),
    )


@functools.cache  # each memory_analysis takes tens of milliseconds
def needed(program: Any) -> int:
    """Bytes that a program needs on each device, according to XLA; 0 where XLA cannot tell."""
    memory = program.memory_analysis()
    parts = ("argument", "output", "temp") if memory is not None else ()
    return sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)


def free_memory(device: jax.Device) -> int:
    """Bytes that a program may use on a device. On a CPU: half of the machine's memory, or of the
    control group's limit, divided by the number of devices."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limited = Path("/sys/fs/cgroup/memory.max")
    if limited.is_file() and (limit := limited.read_text().strip()).isdecimal():
        total = min(total, int(limit))
    return total // 2 // len(jax.local_devices())


def fitting(
    n: int, mesh: Mesh, batch_size: int | None, compiled: Callable[[int], Any]
) -> tuple[int, Any]:
    """(rows of a batch, its program): a batch that is large enough for n images or, where that is
    too large, the largest one that fits in memory.

    n: the number of images; rounded up to a power of two, so that few shapes are compiled.
    batch_size: the most images for each device; None is MOST. compiled: rows -> program.

    Raises MemoryError where not even one image for each device fits.
    """
    devices, device = mesh.size, mesh.devices.flat[0]
    most = batch_size or MOST.get(device.platform, MOST_ELSEWHERE)
    each = min(most, 2 ** math.ceil(math.log2(max(1, n / devices))))
    while True:
        try:
            program = compiled(each * devices)
            need: float = needed(program)
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler rejects what does not fit
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            program, need = None, math.inf
        free = free_memory(device)
        if need <= free:
            return each * devices, program
        needs = "more than there is" if need == math.inf else f"{need / 2**20:,.0f} MiB"
        has = f"{free / 2**20:,.0f} MiB are free"
        if each == 1:
            raise MemoryError(f"batch_size=1 needs {needs} on each device, and only {has}")
        # A power of two: the free memory changes from call to call, and the shapes should not.
        fewer = each // 2 if need == math.inf else int(each * free / need)
        fewer = 2 ** int(math.log2(max(1, min(each // 2, fewer))))
        said = f"{each} images a device would need {needs}, and {has}: {fewer} at a time"
        say(said)
        each = fewer
