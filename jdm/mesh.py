"""The mesh of devices, how arrays lie on it, and how host batches become global arrays.

Owns shardings. A single device is a mesh of one, so no other code counts devices. Batches are split
over the devices by rows. How the weights and what is trained with them lie is config.exec.mesh:

    data   whole on every device
    fsdp   split: every device has a part of each large array, and gets the others for a training
           step, or a call that samples or evaluates (fully sharded data parallelism)
"""

import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jdm import names
from jdm.errors import InvalidValue

Devices = Sequence[jax.Device] | None  # None: all of them
SMALL = 1024  # the number of elements below which an array is never split


def _started(find: Callable[[], list[jax.Device]]) -> list[jax.Device]:
    """The devices that `find` returns. Raises InvalidValue where JAX cannot use $JAX_PLATFORMS."""
    try:
        return find()
    except (RuntimeError, AssertionError):  # the type and the text depend on JAX and the platform
        if not (wanted := jax.config.jax_platforms):  # type: ignore[attr-defined]
            raise
        jax.config.update("jax_platforms", None)
        there = sorted({device.platform for device in jax.devices()} | {"cpu"})
        jax.extend.backend.clear_backends()
        jax.config.update("jax_platforms", wanted)
        allowed = f"cannot be used: this JAX finds {' and '.join(there)} here"
        raise InvalidValue(
            "JAX_PLATFORMS", wanted, allowed, "unset, it is the best of these"
        ) from None


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices, by default all devices of all hosts, along one axis, "data".

    Raises InvalidValue where $JAX_PLATFORMS names devices that are not there.
    """
    devices = _started(jax.devices) if devices is None else devices
    # Auto axes: Explicit ones refuse gathers such as abar[t] with a sharded t.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


@typing.no_type_check  # of the tests' run-time checker, so that wrong types are refused here
def local_mesh(devices: Devices = None) -> Mesh:
    """Devices of this host along "data", for work that each host does separately.

    devices: of JAX's default platform, since implementations are chosen for it (jdm.target). Raises
    InvalidValue for what are not different ones of this host.
    """
    if devices is None:
        return make_mesh(_started(jax.local_devices))
    each = list(devices) if isinstance(devices, Sequence) else [devices]
    here = _started(jax.local_devices)
    if not each or not all(x in here for x in each) or len(set(each)) < len(each):
        allowed = "must be one or more different devices of jax.local_devices()"
        hint = "JAX_PLATFORMS chooses another platform"
        raise InvalidValue("devices", devices, allowed, hint)
    return make_mesh(each)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def _fsdp(shape: tuple[int, ...], devices: int) -> int | None:
    """The axis to split: the longest that divides by the number of devices, of equal ones the last.
    None where there is none, and for an array that is SMALL."""
    axes = [axis for axis, length in enumerate(shape) if length % devices == 0]
    if devices == 1 or math.prod(shape) < SMALL or not axes:
        return None
    return max(axes, key=lambda axis: (shape[axis], axis))


# (shape, number of devices) -> the axis of an array that is split, or None.
MESHES: dict[str, Callable[[tuple[int, ...], int], int | None]] = names.MESHES.records(
    data=lambda shape, devices: None, fsdp=_fsdp
)


def shardings(tree: PyTree, mesh: Mesh, name: str) -> PyTree:
    """The sharding of each array of a tree by the rule `name`, of MESHES."""
    rule = MESHES[names.check_name("config.exec.mesh", name, MESHES)]

    def of(leaf: Any) -> NamedSharding:
        axis = rule(leaf.shape, mesh.size)
        split = [None] * (axis or 0) + (["data"] if axis is not None else [])
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree.map(of, tree)


def share_of_each(tree: PyTree) -> tuple[float, int]:
    """(the share of a tree's bytes that each device holds, the number of arrays that are whole).
    The arrays may be shapes with a sharding."""
    leaves = jax.tree.leaves(tree)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    parts = [x.sharding.shard_shape(x.shape) for x in leaves]
    held = sum(math.prod(part) * x.dtype.itemsize for part, x in zip(parts, leaves, strict=True))
    return held / size, sum(part == x.shape for part, x in zip(parts, leaves, strict=True))


@functools.lru_cache(maxsize=2)
def _gather(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def whole(weights: PyTree) -> PyTree:
    """Weights as a program of this host computes with them: all of each array on every device of
    this host that holds a part of them. Weights that lie so are not copied, and those on no mesh,
    such as NumPy arrays, are returned as they are. Where weights are split over the devices of
    several hosts, all of these call this together."""
    if (mesh := _mesh(weights)) is None:
        return weights
    if not all(x.is_fully_replicated for x in jax.tree.leaves(weights)):
        weights = _gather(mesh)(weights)
    here = replicated(_of_this_host(mesh))

    def local(x: jax.Array) -> jax.Array:
        if x.is_fully_addressable:
            return x
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, here, parts)

    return jax.tree.map(local, weights)


def check_batch(batch_size: int, mesh: Mesh, parameter: str) -> None:
    """Raises InvalidValue, naming the parameter, where a batch does not divide by the devices."""
    if batch_size % mesh.size:
        raise InvalidValue(parameter, batch_size, f"does not divide by the {mesh.size} devices")


def on_devices(arrays: PyTree, rows: int, mesh: Mesh) -> PyTree:
    """A tree of NumPy arrays, each padded with its last row to `rows` rows, and split over the
    devices."""
    by = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.device_put(_padded(arrays, rows), by)


def _padded(arrays: PyTree, rows: int) -> PyTree:
    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1), mode="edge")

    return jax.tree.map(pad, arrays)


def in_batches(
    function: Callable[..., PyTree],
    weights: PyTree,
    arrays: Sequence[np.ndarray],
    size: int,
    done: Callable[[int], Any] = lambda count: None,
) -> PyTree:
    """What a function computes row by row, in batches of one shape: NumPy arrays of all rows.

    function: (weights, a batch of each of the arrays) -> a tree of arrays with as many rows.
    weights: a tree of arrays, or None; the function gets them `whole`. Where they are on several
    devices of this host, so are the rows of a batch, whose number is then rounded up to a multiple
    of the devices. arrays: one or more, of N rows each. size: rows of a batch, 1 or more; it does
    not change the result. done: called after each batch with its number of rows.
    """
    rows = len(arrays[0])
    if not rows:
        return jax.tree.map(
            lambda x: np.zeros((0, *x.shape[1:]), x.dtype),
            jax.eval_shape(
                function, weights, *(np.zeros((1, *x.shape[1:]), x.dtype) for x in arrays)
            ),
        )
    mesh, weights = mesh_of(weights), whole(weights)
    size = size if mesh is None else -(-size // mesh.size) * mesh.size
    found = []
    for start in range(0, rows, size):
        part = tuple(x[start : start + size] for x in arrays)
        count = len(part[0])
        batch = _padded(part, size) if mesh is None else on_devices(part, size, mesh)
        found.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], function(weights, *batch)))
        done(count)
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def mesh_of(weights: PyTree) -> Mesh | None:
    """The devices of this host that arrays are on; None where they are on no mesh."""
    mesh = _mesh(weights)
    return None if mesh is None else _of_this_host(mesh)


def _mesh(weights: PyTree) -> Mesh | None:
    """The devices, of all hosts, that arrays are on; None where they are on no mesh."""
    leaf = next(iter(jax.tree.leaves(weights)), None)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return sharding.mesh


def _of_this_host(mesh: Mesh) -> Mesh:
    """The part of a mesh that is on this host."""
    return make_mesh(mesh.local_devices) if mesh.is_multi_process else mesh


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch as rows of a global array over the mesh."""
    sharding = by_row(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
