"""Weights of the published PyTorch implementation to a work folder, and back.

Owns the names, order and layouts of its state_dict, and the reading and writing of such files.
A file holds weights alone: how many steps, which schedule, what is predicted, how many heads an
attention has and in which order, only the config can say, and nothing of it is guessed.

    convolution  weight [out, in, h, w]   kernel [h, w, in, out]
    linear       weight [out, in]         kernel [in, out]
    pointwise    weight [out, in, 1]      kernel [in, out]         (a Conv1d over positions)

PyTorch is an extra, imported inside the functions that need it. Files are read as weights alone:
code in a pickle is never run.
"""

import importlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jdm import checkpoint
from jdm import config as configs
from jdm.files import write_whole
from jdm.joint import abstract_weights, load
from jdm.mesh import make_mesh, replicated
from jdm.nn.model import JointModel
from jdm.nn.unet import level_sizes

ENDINGS = (".pt", ".safetensors")
HEAD_PREFIX = "clasifier"  # as the published code spells it


class ConvertError(ValueError):
    """A file that cannot be converted, in one sentence; `differences` lists them all."""

    def __init__(self, sentence: str, differences: list[str] = ()):
        super().__init__(sentence)
        self.differences = list(differences)


# Names and layouts -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How an array of the file becomes ours, and back."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
COUNTER = Layout(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64))
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
POINTWISE = Layout(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])
CONVOLUTION = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))

# Every kind of layer: (name in the file, collection and name in ours, layout) of its arrays.
LAYERS = {
    "linear": (("weight", "params", "kernel", LINEAR), ("bias", "params", "bias", SAME)),
    "pointwise": (("weight", "params", "kernel", POINTWISE), ("bias", "params", "bias", SAME)),
    "convolution": (("weight", "params", "kernel", CONVOLUTION), ("bias", "params", "bias", SAME)),
    "norm": (("weight", "params", "scale", SAME), ("bias", "params", "bias", SAME)),
    "batch_norm": (
        ("weight", "params", "scale", SAME),
        ("bias", "params", "bias", SAME),
        ("running_mean", "batch_stats", "mean", SAME),
        ("running_var", "batch_stats", "var", SAME),
        ("num_batches_tracked", "batch_stats", "count", COUNTER),
    ),
}

# Every kind of block: (name in the file, path in ours, kind of layer) of its layers.
RESIDUAL = (
    ("in_layers.0", "norm_in/norm", "norm"),
    ("in_layers.2", "conv_in", "convolution"),
    ("emb_layers.1", "time", "linear"),
    ("out_layers.0", "norm_out/norm", "norm"),
    ("out_layers.3", "conv_out", "convolution"),
    ("skip_connection", "shortcut", "convolution"),  # where the channels change
)
ATTENTION = (
    ("norm", "norm/norm", "norm"),
    ("qkv", "qkv", "pointwise"),
    ("proj_out", "project", "pointwise"),
)
HEAD = (
    ("bn_1", "norm_in", "batch_norm"),
    ("fc_1", "in", "linear"),
    ("bn_2", "norm_out", "batch_norm"),
    ("fc_2", "out", "linear"),
)
TIME = (("0", "time_in", "linear"), ("2", "time_out", "linear"))
OUT = (("0", "norm/norm", "norm"), ("2", "out", "convolution"))


def _blocks(model: JointModel) -> Iterator[tuple[str, str, tuple]]:
    """(prefix in the file, path in ours, layers) of the UNet's blocks, in the file's order."""
    sizes = level_sizes(model.image_size, len(model.multipliers))
    last = len(sizes) - 1
    attends = [side in model.attention for side in sizes]

    def block(prefix, path, level):
        yield f"{prefix}.0", f"{path}/residual", RESIDUAL
        if attends[level]:
            yield f"{prefix}.1", f"{path}/attention", ATTENTION

    def resample(prefix, path, name):
        inside = (name, "conv", "convolution")
        yield prefix, path, RESIDUAL if model.resample == "resblock" else (inside,)

    yield "time_embed", "unet", TIME
    yield "input_blocks.0", "unet", (("0", "stem", "convolution"),)
    count = 1
    for level in range(last + 1):
        for i in range(model.blocks):
            yield from block(f"input_blocks.{count}", f"unet/encoder_{level}_{i}", level)
            count += 1
        if level < last:
            yield from resample(f"input_blocks.{count}.0", f"unet/down_{level}", "op")
            count += 1
    yield "middle_block.0", "unet/mid_in/residual", RESIDUAL
    yield "middle_block.1", "unet/mid_in/attention", ATTENTION
    yield "middle_block.2", "unet/mid_out/residual", RESIDUAL
    count = 0
    for level in range(last, -1, -1):
        for i in range(model.blocks + 1):
            prefix = f"output_blocks.{count}"
            yield from block(prefix, f"unet/decoder_{level}_{i}", level)
            if level > 0 and i == model.blocks:
                place = 2 if attends[level] else 1
                yield from resample(f"{prefix}.{place}", f"unet/up_{level - 1}", "conv")
            count += 1
    yield "out", "unet", OUT


class Entry(NamedTuple):
    """One array of the file. path: of ours, from the collection down. shape, dtype: the file's."""

    path: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]
    dtype: np.dtype


def entries(model: JointModel, head: bool) -> dict[str, Entry]:
    """{name in the file: Entry} of a model, in the file's order. head: with the classifier's.

    Raises ConvertError where head is asked of a model whose head is not the published one.
    """
    if head and model.head != "published":
        raise ConvertError(
            f"model.head={model.head!r} has no place in a published file, which has model.head="
            "'published'; --without-head converts all but the head"
        )
    ours = flatten_dict(abstract_weights(model, replicated(make_mesh())))
    blocks = [(HEAD_PREFIX, "head", HEAD)] if head else []
    found = {}
    for prefix, block, layers in [*blocks, *_blocks(model)]:
        for name, path, kind in layers:
            for array, collection, leaf, layout in LAYERS[kind]:
                at = (collection, *block.split("/"), *path.split("/"), leaf)
                if at in ours:  # all but the shortcuts of blocks that need none
                    theirs = layout.theirs(np.broadcast_to(ours[at].dtype.type(0), ours[at].shape))
                    found[f"{prefix}.{name}.{array}"] = Entry(
                        at, layout, theirs.shape, theirs.dtype
                    )
    return found


def differences(arrays: dict[str, np.ndarray], wanted: dict[str, Entry]) -> list[str]:
    """One "name: the config wants …, the file has …" for every array that does not fit."""

    def describe(array):
        return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"

    return [
        f"{name}: the config wants {describe(wanted.get(name))}, "
        f"the file has {describe(arrays.get(name))}"
        for name in wanted | arrays
        if describe(wanted.get(name)) != describe(arrays.get(name))
    ]


# Both ways ---------------------------------------------------------------------------------------


def load_weights(
    path: str | os.PathLike, config: ConfigDict, *, without_head: bool = False
) -> dict[str, Any]:
    """{"params", "batch_stats"} of a state_dict, numpy arrays.

    path: a .pt or .safetensors file of raw or averaged weights. config: of the network that they
    are of. without_head: the file holds no classifier; the head is initialised by the config's
    seed.

    Raises ConvertError for a file that cannot be read or does not fit the config in every name,
    shape and dtype; ImportError without PyTorch.
    """
    model = JointModel(**config.model)
    arrays, wanted = read(path), entries(model, head=not without_head)
    _check_fits(path, arrays, wanted)
    flat = {
        entry.path: np.array(entry.layout.ours(arrays[name]), order="C")
        for name, entry in wanted.items()
    }
    if without_head:
        flat |= _initial_head(model, config.seed)
    return {"params": {}, "batch_stats": {}, **unflatten_dict(flat)}


def from_file(
    path: str | os.PathLike,
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    without_head: bool = False,
) -> None:
    """Makes a work folder of a state_dict: weights and config, at step 0; see `load_weights`.

    workdir: must be empty or absent; it appears whole or not at all. without_head: its config says
    loss.terms="diffusion", whatever was given, so that no guidance follows a head without training.

    Raises ConvertError for a folder that is not empty, too, and CheckpointError where saving fails.
    """
    workdir = Path(workdir)
    check_workdir(workdir)
    weights = load_weights(path, config, without_head=without_head)
    partial = workdir.with_name(f"{workdir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    settings = configs.to_dict(config)
    if without_head:
        settings["loss"]["terms"] = "diffusion"
    checkpoint.save(partial, 0, weights=weights, config=settings, keep=1)
    write_whole(partial / "config.json", json.dumps(settings, indent=2) + "\n")
    partial.rename(workdir)


def to_file(
    joint_path: str | os.PathLike, path: str | os.PathLike, *, without_head: bool = False
) -> None:
    """Writes the weights of a work folder as a state_dict.

    path: ends in .pt or .safetensors. without_head: leaves the classifier out.

    Raises ConvertError for another ending and for a head that is not the published one,
    CheckpointError where there is no whole checkpoint, ImportError without PyTorch.
    """
    check_ending(path)
    joint = load(joint_path)
    write(path, state_dict(joint.model, jax.device_get(joint.weights), head=not without_head))


def state_dict(model: JointModel, weights: Any, head: bool = True) -> dict[str, np.ndarray]:
    """{name in the file: array} of {"params", "batch_stats"}. head: with the classifier's.

    Raises ConvertError where the model's head is not the published one.
    """
    ours = flatten_dict(weights)
    return {  # a copy: contiguous, and writable, as PyTorch asks
        name: np.array(entry.layout.theirs(np.asarray(ours[entry.path])), order="C")
        for name, entry in entries(model, head).items()
    }


def _check_fits(path, arrays: dict[str, np.ndarray], wanted: dict[str, Entry]) -> None:
    found = differences(arrays, wanted)
    headless = not any(name.startswith(f"{HEAD_PREFIX}.") for name in arrays)
    if found and headless and len(found) == sum(n.startswith(f"{HEAD_PREFIX}.") for n in wanted):
        raise ConvertError(
            f"{path} holds no classifier ({HEAD_PREFIX}.…), and its network fits otherwise; "
            "--without-head converts it with a freshly initialised head",
            found,
        )
    if found:
        more = f"; {len(found) - 1} more differ" if len(found) > 1 else ""
        raise ConvertError(f"{path} does not fit the config: {found[0]}{more}", found)
    for name, entry in wanted.items():
        if entry.layout is COUNTER and not 0 <= arrays[name] < 2**31:
            raise ConvertError(f"{path}: {name} is {arrays[name]}, which is no count of batches")


def _initial_head(model: JointModel, seed: int) -> dict[tuple[str, ...], np.ndarray]:
    """The head's arrays as training with that seed would begin with them, by path."""

    @jax.jit
    def init(key):  # what is not of the head is compiled away
        x = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
        flat = flatten_dict(model.init(key, x, jnp.zeros((1,), jnp.int32)))
        return {"/".join(at): leaf for at, leaf in flat.items() if at[1] == "head"}

    return {tuple(at.split("/")): np.asarray(x) for at, x in init(jax.random.key(seed)).items()}


def check_workdir(workdir: Path) -> None:
    """Raises ConvertError for a folder that a conversion would write into or over."""
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise ConvertError(f"{workdir} exists and is not empty; a new folder is needed")


# Files -------------------------------------------------------------------------------------------


def check_ending(path: str | os.PathLike) -> str:
    """The ending of a file that can be read and written; ConvertError for any other."""
    ending = Path(path).suffix
    if ending not in ENDINGS:
        raise ConvertError(f"{path} must end in one of {', '.join(ENDINGS)}")
    return ending


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: array} of a state_dict on disk, in its order.

    Raises ConvertError for a file that is missing, damaged, holds code or no state_dict; OSError
    where it cannot be opened.
    """
    ending = check_ending(path)
    if not Path(path).is_file():
        raise ConvertError(f"{path} is not a file")
    with open(path, "rb"):
        pass  # what may not be opened is not damaged
    load_file = {".pt": _read_torch, ".safetensors": _read_safetensors}[ending]
    try:
        return load_file(path)
    except (ConvertError, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ConvertError(
            f"{path} is damaged or holds more than weights{what}, and code in a file is never run"
        ) from error
    # PyTorch has no type of its own for "damaged": a file that was cut is an OSError, a
    # RuntimeError or an EOFError, depending on where.
    except Exception as error:
        cause = str(error).split("\n")[0] or type(error).__name__
        raise ConvertError(f"{path} is damaged or no state_dict: {cause}") from error


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes a state_dict; the file appears whole or not at all."""
    if check_ending(path) == ".safetensors":
        content = _import("safetensors.numpy").save(arrays)
    else:
        torch, buffer = _import("torch"), io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
        content = buffer.getvalue()
    write_whole(Path(path), content)


def _import(name: str) -> Any:
    """A module of the extra "torch"."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"this needs {package}: pip install 'jdm[torch]'") from error


def _read_torch(path) -> dict[str, np.ndarray]:
    torch = _import("torch")
    with warnings.catch_warnings():  # of pickle protocols, which are either read or refused
        warnings.simplefilter("ignore")
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()
    ):
        raise ConvertError(f"{path} holds no state_dict, which is a dict of tensors by name")
    return {name: x.detach().numpy() for name, x in state.items()}


def _read_safetensors(path) -> dict[str, np.ndarray]:
    return _import("safetensors.numpy").load_file(path)
