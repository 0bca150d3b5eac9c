"""The device mesh, and where arrays lie on it."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import psutil
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from jetflow.types import Batch, UsageError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SMALLEST_SHARDED = 2**16  # elements; smaller arrays are replicated

# The axis that a strategy splits over `tensor`, counted from the end. Whatever the strategy, but
# for "replicated", the largest of the other axes that it divides is split over `fsdp`.
STRATEGIES = {"replicated": None, "fsdp": None, "columns": -1, "rows": -2}

# (regex, strategy) for the path of an array; the first that matches counts.
RULES = (
    (r"/(qkv|mlp_in)/", "columns"),
    (r"/layers/(out|mlp_out)/kernel", "rows"),
    (r"", "fsdp"),
)

# Where the named axes of activations and kernels are split, as the nets name them.
NAMED_AXES = (("batch", BATCH_AXES), ("heads", "tensor"), ("mlp", "tensor"), ("embed", "fsdp"))


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    asked_by: str = "config.mesh",
) -> Mesh:
    """A mesh of all devices, or of `devices`; -1, for one of the axes, takes the rest.

    The batch is split over data and fsdp, the state over fsdp and, within layers, tensor. Over
    several slices of a TPU pod, which a slower network joins, only data is split. On GPUs any axis
    may join nodes; data, the outermost one, does first.

    Args:
        asked_by: the field or flag that an error names.

    Raises:
        UsageError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    text = f"{asked_by} has " + ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = len(devices) // known if known > 0 else 0
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        raise UsageError(
            f"{text}, but there are {len(devices)} devices; the product must be {len(devices)}, "
            "where one of them may be -1 for the rest"
        )
    # Where GPUs have a slice_index, it counts nodes.
    on_tpus = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpus else 1
    if sizes["data"] % slices:
        raise UsageError(
            f"{text}, which makes data {sizes['data']} on {slices} slices; set data to a multiple "
            f"of {slices}"
        )
    shape = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Inside, what is compiled splits the named axes of activations over `mesh`."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(NAMED_AXES):
        yield


def batch_parts(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def bytes_per_device(state: Any) -> int:
    """Bytes of a tree's arrays, or abstract ones, on each device."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(state)
    )


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory of a device at the moment of largest use, with the program's own code."""
    # The sum of arguments, results and `temp_size_in_bytes` is more than is ever in use at once.
    memory: Any = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if not peak:  # for GPUs XLA lays out the temporaries by their largest use, and states that
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
    return peak + memory.generated_code_size_in_bytes


def memory_of(mesh: Mesh) -> int:
    """Bytes of each device; CPU devices share those of the machine."""
    devices = mesh.local_devices
    memory = psutil.virtual_memory().total // len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit", memory)


def check_memory(state: Any, mesh: Mesh) -> None:
    """Raise a UsageError where a tree of abstract arrays is larger than its devices' memory."""
    needed, memory = bytes_per_device(state), memory_of(mesh)
    if needed > memory:
        raise UsageError(
            f"the training state takes {needed / 2**30:,.1f} GiB of each device's "
            f"{memory / 2**30:,.1f}; make config.flow smaller, or split the state over more "
            "devices with config.mesh.fsdp"
        )


def describe(mesh: Mesh) -> str:
    """The mesh for a person: 8 x cpu, data 2 and fsdp 4."""
    axes = " and ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}" + (f" ({axes})" if axes else "")


def check_rules(rules: Sequence[Any]) -> None:
    """Raise a UsageError unless these are pairs (regex, strategy), keys of `STRATEGIES`."""
    for rule in rules:
        try:
            regex, strategy = rule
            re.compile(regex)
            STRATEGIES[strategy]
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise UsageError(
                f"config.mesh.rules has {rule!r}, which is no (regex, strategy) ({error}); expected"
                f" pairs, such as (('embedding', 'replicated'),), of {', '.join(STRATEGIES)}"
            ) from error


def state_shardings(mesh: Mesh, abstract_state: Any, rules: Sequence[tuple[str, str]] = ()) -> Any:
    """A sharding for each array of a tree, by `rules` and then `RULES`.

    What an optimizer or an average keeps of a parameter has the parameter's path within its own,
    and lies as the parameter does.

    Args:
        rules: (regex, strategy) pairs; a strategy is a key of `STRATEGIES`.

    Raises:
        UsageError: on an unknown strategy, or a regex that is none.
    """
    check_rules(rules)

    def sharding(path, array) -> NamedSharding:
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        strategy = next(strategy for regex, strategy in (*rules, *RULES) if re.search(regex, name))
        return NamedSharding(mesh, _spec(mesh, array.shape, strategy))

    return jax.tree.map_with_path(sharding, abstract_state)


def placed(abstract: Any, shardings: Any) -> Any:
    """Shapes and types with a sharding for each, as `Checkpoints.restore` takes them."""
    return jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), abstract, shardings
    )


def _spec(mesh: Mesh, shape: tuple[int, ...], strategy: str) -> P:
    if strategy == "replicated" or math.prod(shape) < SMALLEST_SHARDED:
        return P()
    axes: list[str | None] = [None] * len(shape)
    split = STRATEGIES[strategy]
    if split is not None and len(shape) >= -split and shape[split] % mesh.shape["tensor"] == 0:
        axes[split] = "tensor"
    even = [axis for axis, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
    if free := [axis for axis in even if axes[axis] is None]:
        axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def check_batch(field: str, size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raise a UsageError unless each part of the batch has equally many rows on each device."""
    if size < 1:
        raise UsageError(f"{field} is {size}; expected 1 or more")
    if accumulation < 1 or size % accumulation:
        raise UsageError(
            f"{field} {size} is not divisible by config.train.accumulation {accumulation}; "
            "set one of them so that it is"
        )
    parts = batch_parts(mesh)
    if size // accumulation % parts:
        part = f"{field} {size}" + (f" / accumulation {accumulation}" if accumulation > 1 else "")
        raise UsageError(
            f"{part} is not divisible by the {parts} devices that a batch is split over; "
            f"set {field} to a multiple of {accumulation * parts}"
        )


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, "R"]:
    """The rows of a global batch that lie on this process's devices, in ascending order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in places.values()]))


def put_batch(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """This process's rows, which are `local_rows`, to its devices, as parts of the global batch."""
    rows = local_rows(mesh, batch_size)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            return array[np.searchsorted(rows, first) : np.searchsorted(rows, last)]

        shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return Batch(*(put(np.asarray(array)) for array in batch))
