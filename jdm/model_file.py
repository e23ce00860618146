"""A model as three files that anyone may read: what `jdm push` sends and `hf://` fetches.

    config.json          the config, as in a work folder
    model.safetensors    the weights, float32, by names such as "params/unet/stem/kernel"; in its
                         header the step, what the data was, and a digest of the weights
    README.md            the model card, for people

Neither JSON nor safetensors can hold code. Does not know where the files come from or go to.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jdm.errors import Failure
from jdm.files import read_json
from jdm.trees import differences, leaves

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
NAMES = (CONFIG, WEIGHTS)  # what is needed to load a model
FORMAT = "jdm/1"  # of the weights


class Stored(NamedTuple):
    """weights: the pytree. dataset, step: as in a Joint. digest: of the weights when they were
    written, see joint.digest."""

    weights: PyTree
    dataset: dict[str, Any]
    step: int | None
    digest: str


def is_model(folder: Any) -> bool:
    """Whether a folder holds the files of a model, and is not a work folder."""
    return (folder / WEIGHTS).is_file() and not (folder / "checkpoints").exists()


def encode(
    weights: PyTree,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    step: int | None,
    digest: str,
) -> dict[str, bytes]:
    """{name: content} of the files of a model, without its card. Arguments: see `Stored`.

    Raises Failure without safetensors.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in leaves(weights).items()}
    header = {"format": FORMAT, "step": step, "digest": digest, "dataset": dict(dataset)}
    texts = {
        name: value if name == "format" else json.dumps(value) for name, value in header.items()
    }
    content = _import("safetensors.numpy").save(arrays, metadata=texts)
    return {CONFIG: (json.dumps(dict(config), indent=2) + "\n").encode(), WEIGHTS: content}


def read_config(folder: Path) -> dict[str, Any]:
    """The values of config.json. Raises Failure where they are missing or damaged."""
    try:
        return read_json(folder / CONFIG)
    except FileNotFoundError:
        raise Failure(f"{folder / CONFIG} is missing") from None


def read(folder: Path, target: PyTree) -> Stored:
    """What model.safetensors holds, on the devices of the target.

    target: the weights as `jax.ShapeDtypeStruct` with shardings. Raises Failure, one sentence,
    where the file is damaged, was not written here, or does not fit its target.
    """
    path, library = folder / WEIGHTS, _import("safetensors")
    try:
        with library.safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise Failure(f"{path} holds no weights of jdm")
            step, digest, dataset = (json.loads(header[k]) for k in ("step", "digest", "dataset"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (library.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise Failure(f"{path} is damaged: {error}") from error
    for at, wanted, found in differences(leaves(target), arrays):
        raise Failure(f"{path} does not fit its config at {at}: expected {wanted}, found {found}")
    placed = {n: jax.device_put(arrays[n], leaf.sharding) for n, leaf in leaves(target).items()}
    weights = jax.tree.unflatten(jax.tree.structure(target), placed.values())
    return Stored(weights, dataset, step, digest)


def _import(name: str) -> Any:
    """safetensors, of the extra "hub". Raises Failure where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Failure(f"{WEIGHTS} needs safetensors: pip install 'jdm[hub]'") from error
