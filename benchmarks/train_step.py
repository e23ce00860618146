"""One training step of the published recipes, against the same network in PyTorch.

    python benchmarks/train_step.py [--recipes=cifar10,fashion_mnist] [--rounds=5] [--out=FILE]

Protocol. The contenders have the same weights, and each a process of its own; their outputs are
compared first. Then they take turns, one step each, for --rounds rounds after one that is not
counted. No augmentation, float32, the default number of threads; on a GPU, all of them there.

jdm        the step that `jdm train` runs
published  PyTorch as in the published code: two passes, one of noised images through the network
           and one of clean images through the encoder; all score matrices of an attention at once
tuned      PyTorch with one encoder pass of both, fused attention, channels last, and an allocator
           that keeps its memory; and the same through torch.compile (`compiled`)

A ratio is the median, over the rounds, of a contender's time over jdm's in the same round, with the
least and the largest: above 1, jdm is faster. Memory is the peak of a process, on a GPU of the
arrays there. GFLOP/s count the products of matrices and the convolutions, three times those of a
forward pass, and stand beside a product of two 2048×2048 matrices in the same rounds.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from contenders import peak_memory, serve, timed
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


def serve_jdm(recipe: str, folder: Path) -> None:
    """Writes the weights and its outputs to the folder, then serves steps and products."""
    from jdm import startup

    startup.set_up()
    import jax
    import jax.numpy as jnp

    from jdm.analysis.hlo import products
    from jdm.mesh import make_mesh, to_global
    from jdm.nn.model import weight_shapes
    from jdm.numerics import key_of
    from jdm.trainer import compile_step
    from jdm.training.build import build
    from jdm.training.warm import warm_started

    config, mesh = config_of(recipe), make_mesh()
    run, root = build(config, mesh), key_of(0)
    state = warm_started(run.init(root), of_jdm(config, folder)[1])
    batch = to_global(images_of(config, config.data.batch_size), mesh)
    with contextlib.redirect_stdout(sys.stderr):
        step = compile_step(config, run, mesh, root)
    square = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)

    def step_once():
        nonlocal state
        state, metrics = step(state, batch, root)
        jax.block_until_ready((state, metrics))

    def flops():
        x = jnp.zeros(batch["image"].shape)
        t = jnp.zeros(len(x), jnp.int32)
        apply = run.model.clone(attention_implementation="xla").apply
        passes = [
            lambda w, x, t: apply(w, x, t)[0],
            lambda w, x, t: apply(w, apply(w, x, t, method="encode"), t, method="classify"),
        ]
        weights = weight_shapes(run.model)
        return 3 * sum(products(jax.make_jaxpr(one)(weights, x, t).jaxpr) for one in passes)

    def memory():
        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else peak_memory()

    multiply = timed(lambda: product(square).block_until_ready())
    serve({"step": timed(step_once), "product": multiply, "flops": flops, "memory": memory})


def serve_torch(recipe: str, folder: Path, name: str) -> None:
    """Reads the weights from the folder, writes its outputs there, then serves steps."""
    import torch
    from torch.nn import functional

    from jdm.diffusion.process import SCHEDULES

    config, tuned = config_of(recipe), name != "published"
    network, on_device = of_torch(config, folder, name)
    device = next(network.parameters()).device
    network.train()
    ema = [p.detach().clone() for p in network.parameters()]
    optim = config.optim
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=tuned
    )
    betas = SCHEDULES[config.diffusion.schedule](config.diffusion.steps)
    abar = torch.from_numpy(np.cumprod(1 - np.asarray(betas, np.float64))).float().to(device)
    batch = images_of(config, config.data.batch_size)
    images, labels = on_device(batch["image"]), torch.from_numpy(batch["label"]).long().to(device)

    def loss_of(x0, xt, t, target, labels):
        if tuned:
            half, none = len(x0), torch.zeros_like(t)
            mid, skips = network.encode(torch.cat([xt, x0]), torch.cat([t, none]))
            raw = network.decode(mid[:half], [z[:half] for z in skips], t)
            logits = network.classify(mid[half:], [z[half:] for z in skips], none)
        else:
            raw, none = network(xt, t), torch.zeros_like(t)
            logits = network.classify(*network.encode(x0, none), none)
        mse = functional.mse_loss(raw, target)
        return mse + config.loss.weight * functional.cross_entropy(logits, labels)

    loss_fn = torch.compile(loss_of) if name == "compiled" else loss_of

    def step_once():
        x0 = images.float() / 127.5 - 1
        t = torch.randint(0, len(abar), (len(x0),), device=device)
        eps, a = torch.randn_like(x0), abar[t][:, None, None, None]
        xt = a.sqrt() * x0 + (1 - a).sqrt() * eps
        target = eps if config.diffusion.prediction == "eps" else x0
        optimiser.zero_grad()
        loss_fn(x0, xt, t, target, labels).backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        optimiser.step()
        with torch.no_grad():
            if tuned:
                torch._foreach_lerp_(ema, list(network.parameters()), 1 - config.train.ema_decay)
            else:
                for old, new in zip(ema, network.parameters(), strict=True):
                    old.mul_(config.train.ema_decay).add_(new, alpha=1 - config.train.ema_decay)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def memory():
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()

    serve({"step": timed(step_once), "memory": memory})


def measure(recipe: str, names: list[str], rounds: int) -> dict:
    """The figures of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = start(__file__, recipe, names, folder)
        ours, times, products = contenders["jdm"], {name: [] for name in names}, []
        first = {name: contender.ask("step") for name, contender in contenders.items()}
        for name, contender in contenders.items():  # torch.compile warms up over two steps
            first[name] += contender.ask("step") if name == "compiled" else 0
        for _ in range(rounds):
            products.append(ours.ask("product"))
            for name, contender in contenders.items():
                times[name].append(contender.ask("step"))
        flops, memory = ours.ask("flops"), {k: c.ask("memory") for k, c in contenders.items()}
        for contender in contenders.values():
            contender.end()
    return {
        "images": RECIPES[recipe][2],
        "seconds": times,
        "first": first,
        "memory": memory,
        "gflops": flops / statistics.median(times["jdm"]) / 1e9,
        "product_gflops": 2 * 2048**3 / statistics.median(products) / 1e9,
    }


def show(recipe: str, figures: dict) -> None:
    """Prints the rows of one recipe."""
    from timing import spread

    for name, times in figures["seconds"].items():
        ratios = [a / b for a, b in zip(times, figures["seconds"]["jdm"], strict=True)]
        share = figures["memory"][name] / 2**30
        rate = f"{figures['gflops']:.0f} of {figures['product_gflops']:.0f}" * (name == "jdm")
        cells = [f"{recipe}, {figures['images']}", name, f"{statistics.median(times):.3g}"]
        cells += [spread(ratios), f"{share:.1f}", rate]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, rounds=5)
    arguments = parser.parse_args()
    if arguments.contender == "jdm":
        return serve_jdm(arguments.recipe, Path(arguments.folder))
    if arguments.contender:
        return serve_torch(arguments.recipe, Path(arguments.folder), arguments.contender)

    recipes = chosen(parser, arguments.recipes, RECIPES)
    names = chosen(parser, arguments.names, SETTINGS)
    print("| recipe, images | contender | seconds a step | its time : ours | GiB | GFLOP/s |")
    print("|---|---|---|---|---|---|")
    found = {}
    for recipe in recipes:
        found[recipe] = measure(recipe, names, arguments.rounds)
        show(recipe, found[recipe])
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
