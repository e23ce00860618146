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
from pathlib import Path

import numpy as np
from timing import seconds, spread
from twins import images_of

IMAGES, SIDES = (4, 8, 16, 32, 64), (8, 16, 32, 64)  # at 32 pixels a side, and of 16 images
SMALLER = ("model.channels=32", "model.blocks=1", "model.attention=()", "loss.augment=none")


def step_of(name: str, images: int, side: int):
    """() -> None: one training step of so many images."""
    from jdm.config import load_config
    from jdm.mesh import make_mesh, to_global
    from jdm.numerics import key_of
    from jdm.trainer import compile_step
    from jdm.training.build import build

    changes = (*SMALLER, f"model.image_size={side}", f"data.batch_size={images}")
    config = load_config(name, [f"--config.{change}" for change in changes])
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
    if arguments.out and not Path(arguments.out).parent.is_dir():
        parser.error(f"--out={arguments.out}: its folder does not exist")
    from jdm import startup

    startup.set_up()
    kinds = list(dict.fromkeys([*((n, 32) for n in IMAGES), *((16, side) for side in SIDES)]))
    steps = {kind: step_of(arguments.config, *kind) for kind in kinds}
    times: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    for count in range(arguments.rounds + 1):
        for kind, step in steps.items():
            taken = seconds(step)
            times[kind] += [taken] * (count > 0)
    panels: dict[str, dict[int, float]] = {}
    print("| images | side | seconds a step | over the row above |")
    print("|---|---|---|---|")
    for title, group in (
        ("images of 32×32", [(n, 32) for n in IMAGES]),
        ("pixels of each of 16 images", [(16, side) for side in SIDES]),
    ):
        panels[title] = {}
        for i, (images, side) in enumerate(group):
            now, ratio = times[images, side], ""
            if i:
                ratio = spread([a / b for a, b in zip(now, times[group[i - 1]], strict=True)])
            middle = statistics.median(now)
            panels[title][images if title.startswith("images") else side * side] = middle
            print(f"| {images} | {side} | {middle:.3g} | {ratio} |", flush=True)
    if arguments.out:
        draw(arguments.out, panels)


if __name__ == "__main__":
    main()
