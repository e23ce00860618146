"""A training step's time by the number of images, and by the number of pixels of an image.

    python benchmarks/linear.py [--config=reference/cifar10] [--rounds=9] [--out=PICTURE]

Protocol: the step that `jdm train` runs, without augmentation and attention, for random images. One
process has a compiled step for each number of images and of pixels. They take turns, one step each,
for --rounds rounds after one that is not counted. The last column is the time of a row over that of
the row above, in the same round: median (least to greatest). Linear is at most the ratio of their
images or pixels.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import seconds, spread
from twins import images_of

# What grows: {the number on the axis: (images, pixels a side)}.
GROWING = {
    "images of 32×32": {n: (n, 32) for n in (4, 8, 16, 32, 64)},
    "pixels of each of 16 images": {side * side: (16, side) for side in (8, 16, 32, 64)},
}
SMALLER = ("model.channels=32", "model.blocks=1", "model.attention=()", "loss.augment=none")


def config_of(name: str, images: int, side: int):
    """A smaller config of this name. Raises InvalidValue where there is none."""
    from jdm.config import load_config

    changes = (*SMALLER, f"model.image_size={side}", f"data.batch_size={images}")
    return load_config(name, [f"--config.{change}" for change in changes])


def step_of(config, images: int) -> Callable[[], Any]:
    """() -> metrics: a training step of so many images, compiled."""
    from jdm.mesh import make_mesh, to_global
    from jdm.numerics import key_of
    from jdm.trainer import compile_step
    from jdm.training.build import build

    mesh, root = make_mesh(), key_of(0)
    run = build(config, mesh)
    state, batch = run.init(root), to_global(images_of(config, images), mesh)
    with contextlib.redirect_stdout(sys.stderr):
        step = compile_step(config, run, mesh, root)

    def once():
        nonlocal state
        state, metrics = step(state, batch, root)
        return metrics

    return once


def draw(path: str, panels: dict[str, dict[int, float]]) -> None:
    """A picture of the times, with a line that grows linearly from the last point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, (title, times) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        x, y = np.array(list(times)), np.array(list(times.values()))
        axes.loglog(x, y, "o-", label="measured")
        axes.loglog(x, y[-1] * x / x[-1], ":", color="gray", label="linear")
        axes.set_xticks(x, [f"{value:,}" for value in x], minor=False)
        axes.minorticks_off()
        axes.set(xlabel=title, ylabel="seconds a step")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="reference/cifar10", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--out", help="a file for the picture")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} must be at least 1")
    if arguments.out and not Path(arguments.out).parent.is_dir():
        parser.error(f"--out={arguments.out}: its folder does not exist")
    from jdm import startup
    from jdm.errors import InvalidValue

    startup.set_up()
    kinds = {kind for rows in GROWING.values() for kind in rows.values()}
    try:
        configs = {kind: config_of(arguments.config, *kind) for kind in sorted(kinds)}
    except InvalidValue as error:
        parser.error(str(error))
    steps = {kind: step_of(config, kind[0]) for kind, config in configs.items()}
    times: dict[tuple[int, int], list[float]] = {kind: [] for kind in steps}
    for count in range(arguments.rounds + 1):
        for kind, step in steps.items():
            taken = seconds(step)
            times[kind] += [taken] * (count > 0)
    medians = {kind: statistics.median(each) for kind, each in times.items()}
    print("| images | side | seconds a step | over the row above |")
    print("|---|---|---|---|")
    for rows in GROWING.values():
        above: list[float] = []
        for images, side in rows.values():
            now = times[images, side]
            ratio = spread([a / b for a, b in zip(now, above, strict=True)]) if above else ""
            print(f"| {images} | {side} | {medians[images, side]:.3g} | {ratio} |", flush=True)
            above = now
    panels = {
        title: {n: medians[kind] for n, kind in rows.items()} for title, rows in GROWING.items()
    }
    if arguments.out:
        draw(arguments.out, panels)


if __name__ == "__main__":
    main()
