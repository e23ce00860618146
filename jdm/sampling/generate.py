"""Generates the images of a checked request, batch by batch, on this host's devices."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jdm.joint import Joint
from jdm.mesh import on_devices, replicated, whole
from jdm.profiling import trace
from jdm.sampling import programs
from jdm.sampling.request import Request
from jdm.sampling.samples import Samples
from jdm.tracking import Progress


class Batch(NamedTuple):
    """The result of one call of the program; see Samples."""

    images: np.ndarray
    probabilities: np.ndarray | None
    trajectory: np.ndarray | None


def generate(joint: Joint, request: Request, batch_size: int | None, **names: Any) -> Samples:
    """The samples of a request. batch_size: the most images per device and call. names: further
    entries of the settings."""
    _, batches = make_generator(joint, request, batch_size)
    with Progress(len(request.seeds), "sampling", "images") as progress:
        return concatenate(request, request.settings(joint, **names), batches(request, progress))


def concatenate(request: Request, settings: dict[str, Any], batches: Iterable[Batch]) -> Samples:
    """The samples of all batches of a request."""
    images, probabilities, trajectories = zip(*batches, strict=True)
    return Samples(
        np.concatenate(images),
        request.labels,
        request.seeds,
        settings,
        None if probabilities[0] is None else np.concatenate(probabilities),
        None if trajectories[0] is None else np.concatenate(trajectories, axis=1),
        request.class_names,
    )


def make_generator(
    joint: Joint, request: Request, batch_size: int | None
) -> tuple[int, Callable[[Request, Progress], Iterator[Batch]]]:
    """(rows of a batch, a function that generates the request, or parts of it, in batches).

    Compiles the program. batch_size: the most images per device and call.
    """
    mesh, classifier = joint.mesh, request.classifier
    static = (joint.model, classifier and classifier.model, joint.diffusion, request.recipe, mesh)
    compiled = functools.partial(programs.compile_sampler, *static)
    rows, program = programs.fitting(len(request.seeds), mesh, batch_size, compiled)
    weights = (whole(joint.weights), classifier and whole(classifier.weights))
    weights, scale = jax.device_put((weights, np.float32(request.scale)), replicated(mesh))
    scorer, scorer_weights = (classifier, weights[1]) if classifier else (joint, weights[0])

    def batches(request: Request, progress: Progress) -> Iterator[Batch]:
        for start in range(0, len(request.seeds), rows):
            part = request.part(slice(start, start + rows))
            count, probabilities = len(part.seeds), None
            inputs = part.seeds, part.targets, part.given
            seeds, targets, given = on_devices(inputs, rows, mesh)
            images, trajectory, finite = program(weights, seeds, targets, scale, given)
            if not (finite := np.asarray(finite)[:count]).all():
                raise FloatingPointError(
                    f"the image of seed {part.seeds[~finite][0]} is not finite; a smaller scale "
                    f"than {part.scale:g}, or threshold='static', may help"
                )
            if part.labels is not None and scorer.has_classifier:
                found = programs.likelihood(scorer.model, scorer_weights, images, targets)
                guided = part.targets.any(axis=1)
                probabilities = np.where(guided, np.asarray(found)[:count], np.float32(np.nan))
            images = np.asarray(images)[:count]
            trajectory = None if trajectory is None else np.asarray(trajectory)[:, :count]
            yield Batch(images, probabilities, trajectory)
            progress.advance(count)

    return rows, batches


def profile(joint: Joint, request: Request, batch_size: int | None, folder: Path) -> None:
    """Writes a trace of the sampling of the request's first batch to a folder."""
    rows, batches = make_generator(joint, request, batch_size)
    first = request.part(slice(0, rows))
    count = len(first.seeds)
    with Progress(count, "tracing", "images") as progress, trace(folder, f"{count} images"):
        for _ in batches(first, progress):
            pass
