"""The mesh of devices, how arrays lie on it, and how host batches become global arrays.

Owns shardings. One device is a mesh of one: nothing elsewhere asks how many there are.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all hosts along one axis, "data"."""
    # Auto axes: under Explicit ones, gathers such as abar[t] with a sharded t are refused.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """The devices of this host along "data": for work that hosts do each for itself."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises ValueError where a batch does not divide by the devices. name: of the config key."""
    if batch_size % mesh.size:
        raise ValueError(f"{name}={batch_size} does not divide by the {mesh.size} devices")


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch as rows of a global array over the mesh."""
    sharding = by_row(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
