"""Sampling that shows the images while they are made, one step at a time.

`jdm.sample` runs all steps in one program. Here every step is a call of a program, so that the
estimates of the clean images can be seen after each, and the work can end at any. The program
serves any number of steps. It is for pages and notebooks: for many images `jdm.sample` is faster.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jdm.diffusion.guidance import guide
from jdm.diffusion.method import OPTIONS, Method, method_of
from jdm.diffusion.process import Estimate, float_to_pixels
from jdm.diffusion.samplers import SAMPLERS, initial_noise, timesteps, visitor, visits
from jdm.joint import Joint, abstract_weights, as_joint, image_shape, make_network, name_of
from jdm.mesh import by_row, on_devices, replicated, whole
from jdm.numerics import fixed_flags, key_of
from jdm.options import takes
from jdm.sampling import programs
from jdm.sampling.labels import Numbers
from jdm.sampling.request import Request, check_request
from jdm.sampling.samples import Samples

UNSEEN = 128  # the grey of images whose batch has not begun


@takes(OPTIONS, described_here=OPTIONS)
def sample_stepwise(
    joint: Joint | str | os.PathLike,
    n: int | None = None,
    *,
    labels: Numbers | None = None,
    seeds: Numbers | None = None,
    method: Method | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[Samples]:
    """Yields Samples after each step: the estimates of the clean images, and at last the images.

    The last Samples are those of `jdm.sample` with trajectory=True and the same arguments, but for
    the order in which floats are summed: at most one level on 0.1 % of pixels may differ. Those
    before have neither probabilities nor a trajectory.

    joint, n, labels, seeds, method, batch_size: see `jdm.sample`. So are the options:

    OPTIONS

    Raises InvalidValue, naming the argument, in the call itself. While it is read:
    FloatingPointError where an image is not finite; MemoryError where not even one image for each
    device fits.
    """
    path, joint = name_of(joint), as_joint(joint)
    with fixed_flags():
        request = check_request(
            joint,
            n,
            labels=labels,
            seeds=seeds,
            method=method_of(method, options),
            trajectory=True,
            batch_size=batch_size,
        )
    return _emerging(joint, request, batch_size, path)


def _emerging(
    joint: Joint, request: Request, batch_size: int | None, path: str
) -> Iterator[Samples]:
    mesh, method = joint.mesh, request.recipe.method
    images = np.full((len(request.seeds), *joint.image_shape), UNSEEN, np.uint8)
    with fixed_flags():
        settings = request.settings(joint, model=path)
        program = dataclasses.replace(method, steps=1, spacing="uniform")  # of any times
        compiled = functools.partial(_compiled, joint.model, joint.diffusion, program, mesh)
        rows, step = programs.fitting(len(images), mesh, batch_size, compiled)
        once = (whole(joint.weights), np.float32(request.scale))
        weights, scale = jax.device_put(once, replicated(mesh))
        times = timesteps(joint.diffusion, method.steps, method.spacing)
        schedule = visits(joint.diffusion, times, SAMPLERS[method.sampler].evaluations)
        schedule = jax.tree.map(np.asarray, schedule)

    def seen(**more: Any) -> Samples:
        shown = images.copy()
        return Samples(shown, request.labels, request.seeds, settings, **names, **more)

    names: dict[str, Any] = dict(class_names=request.class_names)
    parts, probabilities = [], []
    for start in range(0, len(images), rows):
        part = request.part(slice(start, start + rows))
        count, estimates = len(part.seeds), []
        with fixed_flags():
            inputs = on_devices((part.seeds, part.targets), rows, mesh)
            carry = _start(joint.model, joint.diffusion, program, inputs[0])
        for visit in zip(*(_entries(one) for one in schedule), strict=True):
            with fixed_flags():
                carry, found, finite = step(weights, *inputs, scale, carry, visit)
            if visit[-1]:  # the estimate of a predictor
                continue
            images[start : start + count] = np.asarray(found)[:count]
            estimates.append(images[start : start + count].copy())
            if not (start + count == len(images) and len(estimates) == len(times)):
                yield seen()
        if not (finite := np.asarray(finite)[:count]).all():
            raise FloatingPointError(
                f"the image of seed {part.seeds[~finite][0]} is not finite; a smaller scale than "
                f"{part.scale:g} may help"
            )
        parts.append(np.stack(estimates))
        probabilities.append(_probabilities(joint, weights, part, images[start : start + count]))
    yield seen(
        trajectory=np.concatenate(parts, axis=1),
        probabilities=None if probabilities[0] is None else np.concatenate(probabilities),
    )


def _entries(arrays: Any) -> Any:
    """The entries of an array, or of a tuple of arrays."""
    if isinstance(arrays, np.ndarray):
        return arrays
    return [type(arrays)(*one) for one in zip(*arrays, strict=True)]


@fixed_flags()
def _probabilities(joint: Joint, weights: Any, part: Request, images: np.ndarray) -> Any:
    if part.labels is None or not joint.has_classifier:
        return None
    found = programs.likelihood(joint.model, weights, images, part.targets)
    return np.where(part.targets.any(axis=1), np.asarray(found), np.float32(np.nan))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(model, diffusion, method, seeds):
    """The first carry of `visitor`."""
    keys = key_of(seeds)
    x = initial_noise(diffusion, keys, image_shape(model))
    return visitor(lambda x, t: Estimate(x), diffusion, x, keys, method)[0]


def _step(model, diffusion, method, weights, seeds, targets, scale, carry, visit):
    """(carry, the estimates of x_0 as uint8, whether all pixels of an image are finite)."""
    eps_fn = guide(make_network(model, diffusion, weights), diffusion, method, targets, scale)
    _, step = visitor(eps_fn, diffusion, carry[0], key_of(seeds), method)
    carry, x0 = step(carry, visit)
    return carry, float_to_pixels(x0), jax.numpy.isfinite(x0).all(axis=(1, 2, 3))


@functools.cache
def _compiled(model, diffusion, method, mesh, rows):
    """`_step` for a batch of `rows` images, split over the mesh."""
    by, every = by_row(mesh), replicated(mesh)
    outcomes = model.num_classes * (2 if model.multi_label else 1)
    seeds = jax.ShapeDtypeStruct((rows,), np.uint32, sharding=by)
    targets = jax.ShapeDtypeStruct((rows, outcomes), np.float32, sharding=by)
    scale = jax.ShapeDtypeStruct((), np.float32, sharding=every)
    carry = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=by),
        jax.eval_shape(functools.partial(_start, model, diffusion, method), seeds),
    )
    one = visits(diffusion, np.zeros(1, np.int32), 1)
    visit = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((), np.asarray(x).dtype, sharding=every), one
    )
    step = jax.jit(_step, static_argnums=(0, 1, 2), out_shardings=(by, by, by))
    inputs = (abstract_weights(model, mesh), seeds, targets, scale, carry, visit)
    return step.lower(model, diffusion, method, *inputs).compile()
