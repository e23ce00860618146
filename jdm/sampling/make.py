"""A checked request made: batches through the compiled program, on all devices of this host."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jdm.joint import Joint
from jdm.mesh import by_row, local_mesh, replicated
from jdm.sampling import programs
from jdm.sampling.programs import pad
from jdm.sampling.request import Request, has_classifier
from jdm.sampling.samples import Samples
from jdm.tracking import Progress


class Batch(NamedTuple):
    """What comes out of one call: as in Samples; probabilities and film may be None."""

    images: np.ndarray
    probabilities: np.ndarray | None
    film: np.ndarray | None


def made(
    joint: Joint, request: Request, settings: dict[str, Any], batch_size: int | None = None
) -> Samples:
    """The samples of a checked request."""
    _, make = maker(joint, request, batch_size)
    with Progress(len(request.seeds), "sampling", "images") as progress:
        return joined(request, settings, list(make(request, progress)))


def joined(request: Request, settings: dict[str, Any], batches: list[Batch]) -> Samples:
    """The samples of all batches of a request."""
    images, probabilities, films = zip(*batches, strict=True)
    return Samples(
        np.concatenate(images),
        request.labels,
        request.seeds,
        settings,
        None if probabilities[0] is None else np.concatenate(probabilities),
        None if films[0] is None else np.concatenate(films, axis=1),
    )


def maker(
    joint: Joint, request: Request, batch_size: int | None
) -> tuple[int, Callable[[Request, Progress], Iterator[Batch]]]:
    """(rows of a batch, a function that makes this request or parts of it, batch by batch).

    batch_size: the most images per device and call. What is needed is compiled here.
    """
    mesh, judge = local_mesh(), request.classifier
    rows, program = programs.fitting(
        len(request.seeds),
        mesh,
        batch_size,
        lambda rows: programs.generate(
            joint.model, judge and judge.model, joint.diffusion, request.method, mesh, rows
        ),
    )
    weights = jax.device_put((joint.weights, judge and judge.weights), replicated(mesh))
    scale = jax.device_put(np.float32(request.scale), replicated(mesh))
    judging = request.labels is not None and has_classifier(judge or joint)
    model, own = (joint.model, weights[0]) if judge is None else (judge.model, weights[1])

    def on_devices(x):
        return None if x is None else jax.device_put(pad(x, rows), by_row(mesh))

    def make(request: Request, progress: Progress) -> Iterator[Batch]:
        for start in range(0, len(request.seeds), rows):
            part = request.part(slice(start, start + rows))
            count = len(part.seeds)
            seeds, targets, given = map(on_devices, (part.seeds, part.targets, part.given))
            images, film, finite = program(weights, seeds, targets, scale, given)
            probabilities = None
            if judging:
                found = programs.likelihood(model, own, images, targets)
                asked = part.targets.any(axis=1)
                probabilities = np.where(asked, np.asarray(found)[:count], np.float32(np.nan))
            _check_finite(part, np.asarray(finite)[:count])
            images = np.asarray(images)[:count]
            film = None if film is None else np.asarray(film)[:, :count]
            yield Batch(images, probabilities, film)
            progress.advance(count)

    return rows, make


def _check_finite(part: Request, finite: np.ndarray) -> None:
    """Raises FloatingPointError for images of which a pixel is not a number."""
    if not finite.all():
        raise FloatingPointError(
            f"the image of seed {part.seeds[~finite][0]} is not a number any more: a smaller "
            f"scale than {part.scale:g}, or threshold='static', may keep it one"
        )
