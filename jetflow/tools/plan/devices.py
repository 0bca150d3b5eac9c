"""TPU generations: peak figures, topologies, and devices to compile for on a machine without TPUs.

Peak figures are those of Google's documentation (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e,
tpu7x). Memory is what the compiler (libtpu 0.0.42) leaves to a program.
"""

import dataclasses
import glob
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from jetflow.types import UsageError

# Answers to what libtpu asks of the machine, where that has no TPU.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A JAX device of a generation: a chip, or half of one of tpu7x."""

    kind: str  # JAX's `device_kind`, by libtpu 0.0.42
    hbm_bytes: int  # memory for a program
    flops: float  # peak of bfloat16 matrix products, a second
    hbm_bandwidth: float  # bytes a second to and from that memory
    ici_bandwidth: float  # bytes a second sent within the slice, over all links
    dcn_bandwidth: float  # bytes a second sent to another slice: the share of the host's network
    topologies: tuple[str, ...]  # shapes of a slice, in chips
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of libtpu


_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BLOCKS = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8",
    "8x8x12", "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip
_MEGACORE = {"chip_config_name": "megacore"}
_GIB = 2**30

TPUS = {
    "v4": Tpu("TPU v4", int(30.75 * _GIB), 275e12, 1228e9, 300e9, 6.25e9, _BLOCKS, _MEGACORE),
    "v5e": Tpu("TPU v5 lite", int(15.75 * _GIB), 197e12, 819e9, 200e9, 3.125e9, _PLANES),
    "v5p": Tpu("TPU v5", int(95.74 * _GIB), 459e12, 2765e9, 600e9, 6.25e9, _BLOCKS),
    "v6e": Tpu("TPU v6 lite", int(31.25 * _GIB), 918e12, 1638e9, 400e9, 12.5e9, _PLANES),
    "tpu7x": Tpu("TPU7x", int(94.75 * _GIB), 1153.5e12, 3690e9, 300e9, 6.25e9, _BLOCKS),
}


def find(topology: str) -> Tpu:
    """The generation of a topology such as `v5e:4x4`.

    Raises:
        UsageError: if there is no such topology; names those that exist.
    """
    generation, _, shape = topology.partition(":")
    if generation not in TPUS or shape not in TPUS[generation].topologies:
        known = "; ".join(f"{name}:{' '.join(tpu.topologies)}" for name, tpu in TPUS.items())
        raise UsageError(
            f"topology is {topology!r}; expected GENERATION:SHAPE, as in v5e:4x4, of {known}"
        )
    return TPUS[generation]


def devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices of a topology, to compile for.

    Raises:
        UsageError: if there is no such topology, or no libtpu.
    """
    options = dict(find(topology).options)
    if slices < 1:
        raise UsageError(f"slices is {slices}; expected 1 or more")
    if slices > 1:
        options["num_slices"] = slices
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "planning needs libtpu, the compiler for TPUs, which is not installed; "
            "on Linux, in the clone: pip install -e '.[tpu]'"
        )
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compile beside other processes
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return description.devices


def silence_libtpu() -> None:
    """Keep an installed libtpu from filling stderr on a machine without TPUs.

    JAX tries libtpu when it first looks for devices, unless JAX_PLATFORMS names others.
    """
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
