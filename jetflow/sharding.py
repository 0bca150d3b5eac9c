"""The device mesh, and where arrays lie on it."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jetflow.types import Batch, UsageError

SMALLEST_SHARDED = 2**16  # elements; smaller arrays are replicated


def make_mesh(*, data: int, fsdp: int) -> Mesh:
    """A mesh of all devices with the axes data and fsdp; -1, on one of them, takes the rest.

    The batch is split over both axes, the state over fsdp alone.
    """
    count = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) == 1 and known > 0 and count % known == 0:
        sizes[open_axes[0]] = count // known
    if math.prod(sizes.values()) != count or min(sizes.values()) < 1:
        raise UsageError(
            f"config.mesh has data={data}, fsdp={fsdp}, but there are {count} devices; their "
            f"product must be {count}, where one of them may be -1 for the rest"
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_shardings(mesh: Mesh, abstract_state):
    """A sharding for each array: its largest axis that fsdp divides, if the array is large."""

    def sharding(array) -> NamedSharding:
        parts = mesh.shape["fsdp"]
        axes = [axis for axis, size in enumerate(array.shape) if size % parts == 0]
        if parts == 1 or not axes or math.prod(array.shape) < SMALLEST_SHARDED:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

    return jax.tree.map(sharding, abstract_state)


def check_batch(field: str, size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raise a UsageError unless each part of the batch has equally many rows on each device."""
    if size < 1:
        raise UsageError(f"{field} is {size}; expected 1 or more")
    if accumulation < 1 or size % accumulation:
        raise UsageError(
            f"{field} {size} is not divisible by config.train.accumulation {accumulation}; "
            "set one of them so that it is"
        )
    if size // accumulation % mesh.size:
        part = f"{field} {size}" + (f" / accumulation {accumulation}" if accumulation > 1 else "")
        raise UsageError(
            f"{part} is not divisible by the {mesh.size} devices of the mesh; "
            f"set {field} to a multiple of {accumulation * mesh.size}"
        )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This host's rows of a batch to its devices, as parts of the global batch."""
    sharding = batch_sharding(mesh)
    return Batch(*(jax.make_array_from_process_local_data(sharding, np.asarray(a)) for a in batch))
