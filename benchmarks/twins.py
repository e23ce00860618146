"""One network in jdm and in PyTorch, with the same weights: what the contenders have in common."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from contenders import KEEPS_MEMORY, Contender

RECIPES = {  # name: (config, overrides, images in a batch)
    "cifar10": ("reference/cifar10", (), 16),
    "fashion_mnist": ("reference/fashion_mnist", (), 16),
    "fashion_mnist_c32": ("reference/fashion_mnist", ("model.channels=32",), 32),
    "digits": ("digits", ("model.head=published",), 32),
}
COMPARED = 4  # images in the comparison of outputs
SETTINGS = {"jdm": {}, "published": {}, "tuned": KEEPS_MEMORY, "compiled": KEEPS_MEMORY}


def config_of(recipe: str):
    from jdm.config import load_config

    name, overrides, batch = RECIPES[recipe]
    fixed = ("loss.augment=none", "loss.classify=clean", f"data.batch_size={batch}")
    return load_config(name, [f"--config.{setting}" for setting in (*overrides, *fixed)])


def images_of(config, rows: int) -> dict[str, np.ndarray]:
    rng, model = np.random.default_rng(0), config.model
    shape = (rows, model.image_size, model.image_size, model.image_channels)
    labels = rng.integers(0, model.num_classes, rows).astype(np.int32)
    return {"image": rng.integers(0, 256, shape).astype(np.uint8), "label": labels}


def compared_inputs(config) -> tuple[np.ndarray, np.ndarray]:
    """(x, t) of which the outputs are compared."""
    images = images_of(config, COMPARED)["image"]
    t = np.linspace(0, config.diffusion.steps - 1, COMPARED).astype(np.int32)
    return images.astype(np.float32) / 127.5 - 1, t


def of_jdm(config, folder: Path) -> tuple[Any, Any]:
    """(model, weights {"params", "batch_stats"}); writes the weights and the outputs to the folder.

    No layer is left at its initial 0.
    """
    import jax
    import jax.numpy as jnp

    from jdm import convert
    from jdm.nn.model import example_inputs, make_model
    from jdm.numerics import key_of

    model = make_model(config.model, config.exec)
    weights = {"batch_stats": {}, **jax.jit(model.init)(key_of(0), *example_inputs(model))}
    leaves, structure = jax.tree.flatten(weights["params"])
    keys = jax.random.split(key_of(1), len(leaves))
    leaves = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    weights["params"] = jax.tree.unflatten(structure, leaves)
    np.savez(folder / "weights.npz", **convert.state_dict(model, jax.device_get(weights)))
    raw, logits = jax.jit(model.apply)(weights, *map(jnp.asarray, compared_inputs(config)))
    np.savez(folder / "jdm.npz", raw=np.moveaxis(raw, 3, 1), logits=logits)
    return model, weights


def of_torch(config, folder: Path, name: str) -> tuple[Any, Any]:
    """(network, function from images [B, H, W, C] to its inputs), with the weights of the folder;
    writes the outputs there."""
    import torch
    from torch_network import Network

    tuned = name != "published"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if tuned else torch.contiguous_format
    network = Network(config.model, fused=tuned)
    with np.load(folder / "weights.npz") as arrays:
        network.load_state_dict({k: torch.from_numpy(arrays[k]) for k in arrays})
    network = network.to(device, memory_format=layout).eval()

    def on_device(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.moveaxis(x, 3, 1).copy()).to(device, memory_format=layout)

    x, t = compared_inputs(config)
    with torch.no_grad():
        x, t = on_device(x), torch.from_numpy(t).to(device)
        features = network.encode(x, t)
        raw, logits = network.decode(*features, t), network.classify(*features, t)
    np.savez(folder / f"{name}.npz", raw=raw.cpu().numpy(), logits=logits.cpu().numpy())
    return network, on_device


def add_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags of both benchmarks, and those with which a contender is started."""
    add = parser.add_argument
    add("--recipes", default=",".join(RECIPES), help="(%(default)s)")
    add("--names", default=",".join(SETTINGS), help="contenders (%(default)s)")
    add("--rounds", type=int, default=rounds, help="(%(default)s)")
    add("--out", help="a file for the figures as JSON")
    for name in ("contender", "recipe", "folder"):
        add(f"--{name}", help=argparse.SUPPRESS)


def chosen(parser: argparse.ArgumentParser, text: str, known: dict) -> list[str]:
    """The names in a flag's text; ends the script where one is not known."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is unknown; known: {', '.join(known)}")
    return names


def start(script: str, recipe: str, names: list[str], folder: str) -> dict[str, Contender]:
    """The contenders of a script, whose outputs have been compared."""
    contenders = {}
    for name in names:
        given = (f"--contender={name}", f"--recipe={recipe}", f"--folder={folder}")
        contenders[name] = Contender(script, *given, environment=SETTINGS[name])
        contenders[name].ask("memory")  # the weights, or the outputs, are there
        check_same(Path(folder), name)
    return contenders


def check_same(folder: Path, name: str) -> None:
    """Raises SystemExit where the outputs of a contender are not those of jdm."""
    ours, theirs = np.load(folder / "jdm.npz"), np.load(folder / f"{name}.npz")
    for output in ("raw", "logits"):
        error = np.abs(ours[output] - theirs[output]).max() / np.abs(ours[output]).max()
        if not error < 1e-3:
            sys.exit(f"{name}: {output} differs from ours by {error:.1e} of its largest value")
