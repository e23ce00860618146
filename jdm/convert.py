"""Conversion of the published PyTorch implementation's weights to a work folder, and back.

Owns the names, order and layouts of the arrays in its state_dict; jdm.torch_files reads and writes
such files. A file has weights only. The rest (number of steps, schedule, prediction, attention
heads and their order) comes from the config; nothing is guessed.

    layer        in the file              here
    convolution  weight [out, in, h, w]   kernel [h, w, in, out]
    linear       weight [out, in]         kernel [in, out]
    pointwise    weight [out, in, 1]      kernel [in, out]         (a Conv1d over positions)
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils.epath import PathLike
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jdm import checkpoint
from jdm.config import config_to_dict
from jdm.errors import InvalidValue
from jdm.files import local_path, new_folder, whole_folder, write_whole
from jdm.joint import Joint, as_joint
from jdm.mesh import local_mesh
from jdm.messages import STDOUT, say
from jdm.nn.model import JointModel, example_inputs, make_model, weight_shapes
from jdm.nn.unet import level_sizes
from jdm.numerics import fixed_flags, key_of
from jdm.torch_files import file_format, read
from jdm.trees import differences

HEAD_PREFIX = "clasifier"  # as the published code spells it
FIRST = "time_embed.0.weight"  # an array that every network has

# Names and layouts -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Conversion of an array of the file to ours, and back to theirs."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
COUNTER = Layout(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64))
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
POINTWISE = Layout(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])
CONVOLUTION = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))

# The arrays of each kind of layer: (name in the file, our collection and name, layout).
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

# The layers of each kind of block: (name in the file, our path, kind of layer).
RESIDUAL = (
    ("in_layers.0", "norm_in/norm", "norm"),
    ("in_layers.2", "conv_in", "convolution"),
    ("emb_layers.1", "time", "linear"),
    ("out_layers.0", "norm_out/norm", "norm"),
    ("out_layers.3", "conv_out", "convolution"),
    ("skip_connection", "shortcut", "convolution"),  # if the channels change
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
    """(prefix in the file, our path, layers) of each block of the UNet, in the file's order."""
    sizes = level_sizes(model.image_size, len(model.multipliers))
    last = len(sizes) - 1
    attends = [side in model.attention for side in sizes]
    inputs, outputs = itertools.count(1), itertools.count()  # the file numbers blocks on each side

    def block(prefix, path, level):
        yield f"{prefix}.0", f"{path}/residual", RESIDUAL
        if attends[level]:
            yield f"{prefix}.1", f"{path}/attention", ATTENTION

    def resample(prefix, path, name):
        inside = (name, "conv", "convolution")
        return prefix, path, RESIDUAL if model.resample == "resblock" else (inside,)

    yield "time_embed", "unet", TIME
    yield "input_blocks.0", "unet", (("0", "stem", "convolution"),)
    for level in range(last + 1):
        for i in range(model.blocks):
            yield from block(f"input_blocks.{next(inputs)}", f"unet/encoder_{level}_{i}", level)
        if level < last:
            yield resample(f"input_blocks.{next(inputs)}.0", f"unet/down_{level}", "op")
    yield "middle_block.0", "unet/mid_in/residual", RESIDUAL
    yield "middle_block.1", "unet/mid_in/attention", ATTENTION
    yield "middle_block.2", "unet/mid_out/residual", RESIDUAL
    for level in range(last, -1, -1):
        for i in range(model.blocks + 1):
            prefix = f"output_blocks.{next(outputs)}"
            yield from block(prefix, f"unet/decoder_{level}_{i}", level)
            if level > 0 and i == model.blocks:
                place = 2 if attends[level] else 1
                yield resample(f"{prefix}.{place}", f"unet/up_{level - 1}", "conv")
    yield "out", "unet", OUT


class Entry(NamedTuple):
    """An array of the file. path: where ours is, from the collection on. array: theirs."""

    path: tuple[str, ...]
    layout: Layout
    array: jax.ShapeDtypeStruct


@functools.cache
def entries(model: JointModel, head: bool) -> dict[str, Entry]:
    """{name in the file: Entry} of a model, in the file's order. head: include the classifier.

    Raises InvalidValue where `head` is set and the model's head is not the published one.
    """
    if head and model.head != "published":
        hint = "--without-head converts the weights without the head"
        only = "cannot be converted, only 'published' can"
        raise InvalidValue("config.model.head", model.head, only, hint)
    ours = flatten_dict(weight_shapes(model))
    blocks = [(HEAD_PREFIX, "head", HEAD)] if head else []
    found = {}
    for prefix, block, layers in [*blocks, *_blocks(model)]:
        for name, path, kind in layers:
            for array, collection, leaf, layout in LAYERS[kind]:
                at = (collection, *block.split("/"), *path.split("/"), leaf)
                if at in ours:  # a shortcut exists only where the channels change
                    like = layout.theirs(np.broadcast_to(ours[at].dtype.type(0), ours[at].shape))
                    theirs = jax.ShapeDtypeStruct(like.shape, like.dtype)
                    found[f"{prefix}.{name}.{array}"] = Entry(at, layout, theirs)
    return found


# Both ways ---------------------------------------------------------------------------------------


def load_weights(path: PathLike, config: ConfigDict, *, without_head: bool = False) -> dict:
    """The weights {"params", "batch_stats"} in a state_dict, as NumPy arrays.

    path: a file of weights or of their EMA, see `torch_files.read`; a prefix that all names of the
    network share is ignored. config: of the file's network. without_head: the file has no
    classifier; a new head is initialised, with the config's seed.

    Raises InvalidValue for a file that cannot be read, or that differs from the config in a name,
    shape or dtype (`details` lists all of them). Raises Failure without PyTorch.
    """
    model = make_model(config.model, config.exec)
    arrays, wanted = _without_prefix(read(path)), entries(model, head=not without_head)
    _check_fits(path, arrays, wanted)
    flat = {
        entry.path: np.array(entry.layout.ours(arrays[name]), order="C")
        for name, entry in wanted.items()
    }
    if without_head:
        flat |= _initial_head(model, config.seed)
    return {"params": {}, "batch_stats": {}, **unflatten_dict(flat)}


@fixed_flags()
def from_file(
    path: PathLike, config: ConfigDict, workdir: PathLike, *, without_head: bool = False
) -> None:
    """Converts a state_dict to a work folder: weights and config, as step 0. See `load_weights`.

    workdir: a new or empty folder. without_head: the new config has loss.terms=("diffusion",), so
    that no guidance uses a classifier that was never trained.

    Raises InvalidValue as `load_weights` does, and for a folder that is not empty. Raises
    CheckpointError where the weights cannot be saved.
    """
    workdir = new_folder("workdir", workdir)
    local_mesh()  # raises InvalidValue where JAX cannot start
    weights = load_weights(path, config, without_head=without_head)
    settings = config_to_dict(config)
    if without_head:
        settings["loss"]["terms"] = ("diffusion",)
    with whole_folder(workdir) as folder:
        write_work_folder(folder, 0, weights, settings)


def write_work_folder(
    folder: Path, step: int, weights: Any, config: dict[str, Any], dataset: Any = None
) -> None:
    """Writes a checkpoint without a training state, and config.json. config: JSON values. dataset:
    what the model was trained on, see `data.identity`, where that is known."""
    data = {"dataset": dataset} if dataset else None
    checkpoint.save(folder, step, weights=weights, config=config, data=data, keep=1)
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


@fixed_flags()
def to_file(joint: Joint | PathLike, path: PathLike, *, without_head: bool = False) -> None:
    """Converts the weights of a model, or of the one at that path, to a state_dict.

    path: ends in one of names.WEIGHT_FILES. without_head: omits the classifier.

    Raises InvalidValue for another ending, and for a head that is not the published one. Raises
    CheckpointError where no model can be loaded, and Failure without PyTorch.
    """
    path = Path(local_path("to", path))
    encode = file_format("to", path).encode  # raises before the model is loaded
    joint = as_joint(joint)
    arrays = state_dict(joint.model, jax.device_get(joint.weights), head=not without_head)
    write_whole(path, encode(arrays))


def state_dict(model: JointModel, weights: Any, head: bool = True) -> dict[str, np.ndarray]:
    """{name in the file: array} of weights {"params", "batch_stats"}; for `head` see `entries`."""
    ours = flatten_dict(weights)
    return {  # copies, since PyTorch needs contiguous and writable arrays
        name: np.array(entry.layout.theirs(np.asarray(ours[entry.path])), order="C")
        for name, entry in entries(model, head).items()
    }


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays without the prefix of a network inside another module, such as "model."."""
    found = {name.removesuffix(FIRST) for name in arrays if name.endswith(FIRST)}
    prefix = found.pop() if len(found) == 1 else ""
    if prefix.endswith("."):
        say(f"read without {prefix!r} before the names", STDOUT)
        arrays = {name.removeprefix(prefix): x for name, x in arrays.items()}
    return arrays


def _check_fits(path, arrays: dict[str, np.ndarray], wanted: dict[str, Entry]) -> None:
    """Raises InvalidValue where the arrays of a file are not those that the config describes."""
    found = differences({name: entry.array for name, entry in wanted.items()}, arrays)
    details = tuple(f"{d.path}: the config wants {d.wanted}, the file has {d.found}" for d in found)

    def error(allowed: str, hint: str = "") -> InvalidValue:
        return InvalidValue("from", str(path), allowed, hint, details)

    absent = {name for name in wanted if name.startswith(f"{HEAD_PREFIX}.")} - arrays.keys()
    if absent and absent == {difference.path for difference in found}:
        allowed = f"has no classifier ({HEAD_PREFIX}.…), and its network fits otherwise"
        raise error(allowed, "--without-head initialises a new head")
    if details:
        more = f"; {len(details) - 1} more differ" if len(details) > 1 else ""
        raise error(f"does not fit the config: {details[0]}{more}")
    for name, entry in wanted.items():
        if entry.layout is COUNTER and not 0 <= arrays[name] < 2**31:
            raise error(f"has {name} = {arrays[name]}, which is not a count of batches")


def _initial_head(model: JointModel, seed: int) -> dict[tuple[str, ...], np.ndarray]:
    """{path: array} of the head, as initialised for training with that seed."""

    @jax.jit
    def init(key):  # the compiler removes everything that the head does not need
        flat = flatten_dict(model.init(key, *example_inputs(model)))
        return {at: leaf for at, leaf in flat.items() if at[1] == "head"}

    return jax.device_get(init(key_of(seed)))
