"""One denoising step of the published recipes, against the same network in PyTorch.

    python benchmarks/sample_step.py [--recipes=cifar10,fashion_mnist] [--rounds=9] [--out=FILE]

A denoising step is one estimate of the noise for a batch at a middle t; what a sampler adds to it
is small. The contenders, the comparison of their outputs and the meaning of a ratio are those of
benchmarks/train_step.py; none drops out. jdm is timed without guidance and with each of its own.
PyTorch has the unguided step, and as published the guided one: the gradient of the classifier with
respect to every representation, all of which are moved before they are decoded.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from contenders import serve, timed
from twins import (
    RECIPES,
    SETTINGS,
    add_flags,
    chosen,
    config_of,
    images_of,
    of_jdm,
    of_torch,
    start,
)

SCALE = 1000.0  # of the published update


def inputs_of(config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, t, labels)"""
    batch = images_of(config, config.data.batch_size)
    x = batch["image"].astype(np.float32) / 127.5 - 1
    return x, np.full(len(x), config.diffusion.steps // 2, np.int32), batch["label"]


def serve_jdm(recipe: str, folder: Path) -> None:
    from jdm import startup

    startup.set_up()
    import jax
    import jax.numpy as jnp

    from jdm.diffusion.guidance import GUIDANCE, guide
    from jdm.diffusion.method import Method
    from jdm.diffusion.process import Diffusion
    from jdm.joint import make_network

    config = config_of(recipe)
    model, weights = of_jdm(config, folder)
    diffusion, (x, t, labels) = Diffusion(**config.diffusion), map(jnp.asarray, inputs_of(config))
    targets = jax.nn.one_hot(labels, config.model.num_classes)

    def estimate(guidance, weights, x, t, targets):
        network = make_network(model, diffusion, weights)
        scale = GUIDANCE[guidance].default_scale
        return guide(network, diffusion, Method(guidance=guidance), targets, scale)(x, t).eps

    step = jax.jit(estimate, static_argnums=0)
    calls = {
        name: timed(lambda name=name: step(name, weights, x, t, targets).block_until_ready())
        for name in GUIDANCE
    }
    serve(calls)


def serve_torch(recipe: str, folder: Path, name: str) -> None:
    import torch
    from torch.nn import functional

    config = config_of(recipe)
    network, on_device = of_torch(config, folder, name)
    device = next(network.parameters()).device
    x, t, labels = inputs_of(config)
    x, t, labels = on_device(x), *(torch.from_numpy(z).to(device) for z in (t, labels))
    for weight in network.parameters():
        weight.requires_grad_(False)

    @torch.no_grad()
    def none():
        return network(x, t).cpu()

    def published():
        with torch.enable_grad():
            mid, skips = network.encode(x.detach().requires_grad_(True), t)
            features = [mid, *skips]
            loss = functional.cross_entropy(network.classify(mid, skips, t), labels.long())
            gradients = torch.autograd.grad(loss * len(x), features)
        with torch.no_grad():
            mid, *skips = (z + SCALE * dz for z, dz in zip(features, gradients, strict=True))
            return network.decode(mid, skips, t).cpu()

    if name == "compiled":
        network = torch.compile(network)
    serve({"none": timed(none), "published": timed(published)})


def measure(recipe: str, names: list[str], rounds: int) -> dict:
    """{row: seconds of each round} of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = start(__file__, recipe, names, folder)
        asked = {"jdm": ("none", "pixel", "representation", "published")}
        rows = [
            (name, guidance)
            for name in names
            for guidance in asked.get(name, ("none", "published")[: 1 + (name == "published")])
        ]
        for name, guidance in [*rows, *rows]:
            contenders[name].ask(guidance)
        times = {f"{name}, {guidance}": [] for name, guidance in rows}
        for _ in range(rounds):
            for name, guidance in rows:
                times[f"{name}, {guidance}"].append(contenders[name].ask(guidance))
        for contender in contenders.values():
            contender.end()
    return times


def main() -> None:
    from timing import spread

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, rounds=9)
    arguments = parser.parse_args()
    if arguments.contender == "jdm":
        return serve_jdm(arguments.recipe, Path(arguments.folder))
    if arguments.contender:
        return serve_torch(arguments.recipe, Path(arguments.folder), arguments.contender)

    recipes = chosen(parser, arguments.recipes, RECIPES)
    names = chosen(parser, arguments.names, SETTINGS)
    print("| recipe, images | contender, guidance | seconds | its time : jdm, none |")
    print("|---|---|---|---|")
    found = {}
    for recipe in recipes:
        found[recipe] = measure(recipe, names, arguments.rounds)
        for row, times in found[recipe].items():
            ratios = [a / b for a, b in zip(times, found[recipe]["jdm, none"], strict=True)]
            cells = [f"{recipe}, {RECIPES[recipe][2]}", row, f"{statistics.median(times):.3g}"]
            print(f"| {' | '.join([*cells, spread(ratios)])} |", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
