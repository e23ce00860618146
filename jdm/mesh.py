"""The mesh of devices, how arrays lie on it, and how host batches become global arrays.

Owns shardings. A single device is a mesh of one, so no other code counts devices.
"""

from collections.abc import Callable, Sequence

import jax
import jax.extend
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jdm.errors import InvalidValue


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


def local_mesh() -> Mesh:
    """The devices of this host along "data", for work that each host does separately."""
    return make_mesh(_started(jax.local_devices))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def of_this_host(tree: PyTree) -> PyTree:
    """Arrays that are replicated over all hosts, as arrays replicated over the devices of this one,
    for work that each host does separately. Copies nothing."""
    here = replicated(local_mesh())

    def local(x: jax.Array) -> jax.Array:
        if x.is_fully_addressable:
            return x
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, here, parts)

    return jax.tree.map(local, tree)


def check_batch(batch_size: int, mesh: Mesh, parameter: str) -> None:
    """Raises InvalidValue, naming the parameter, where a batch does not divide by the devices."""
    if batch_size % mesh.size:
        raise InvalidValue(parameter, batch_size, f"does not divide by the {mesh.size} devices")


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch as rows of a global array over the mesh."""
    sharding = by_row(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
