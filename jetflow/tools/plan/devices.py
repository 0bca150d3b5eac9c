"""TPU generations: their figures, their topologies, and devices to compile for without having one.

Peak figures are those of Google's documentation (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e,
tpu7x); memory is what the compiler (libtpu 0.0.42) leaves to a program.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental import topologies

from jetflow.types import UsageError


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What JAX takes for a device of a generation: a chip, and half of one of tpu7x.

    Attributes:
        hbm_bytes: memory for a program.
        flops: peak of bfloat16 matrix products, a second.
        hbm_bandwidth: bytes a second, to and from that memory.
        ici_bandwidth: bytes a second that it sends within its slice, over all of its links.
        dcn_bandwidth: bytes a second that it sends to another slice: its share of the host's
            network.
        topologies: shapes of a slice, in chips.
        options: of libtpu, for the way that JAX uses its cores.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    topologies: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BLOCKS = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8",
    "8x8x12", "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip

TPUS = {
    "v4": Tpu(int(30.75 * 2**30), 275e12, 1228e9, 300e9, 6.25e9, _BLOCKS,
              {"chip_config_name": "megacore"}),
    "v5e": Tpu(int(15.75 * 2**30), 197e12, 819e9, 200e9, 3.125e9, _PLANES),
    "v5p": Tpu(int(95.74 * 2**30), 459e12, 2765e9, 600e9, 6.25e9, _BLOCKS),
    "v6e": Tpu(int(31.25 * 2**30), 918e12, 1638e9, 400e9, 12.5e9, _PLANES),
    "tpu7x": Tpu(int(94.75 * 2**30), 1153.5e12, 3690e9, 300e9, 6.25e9, _BLOCKS),
}  # fmt: skip

# What JAX calls a device of each (`device_kind`, as libtpu 0.0.42 has it).
KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip

# libtpu asks for the machine that it runs on. Here it compiles for another one, beside others.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def find(topology: str) -> Tpu:
    """The generation of a topology, `v5e:4x4` say.

    Raises:
        UsageError: if there is no such topology; names those that there are.
    """
    generation, _, shape = topology.partition(":")
    if generation not in TPUS:
        known = "; ".join(f"{name}:{' '.join(tpu.topologies)}" for name, tpu in TPUS.items())
        raise UsageError(
            f"--topology is {topology!r}; expected GENERATION:SHAPE, as in v5e:4x4, of {known}"
        )
    tpu = TPUS[generation]
    if shape not in tpu.topologies:
        known = ", ".join(f"{generation}:{shape}" for shape in tpu.topologies)
        raise UsageError(f"--topology is {topology!r}; those of {generation} are {known}")
    return tpu


def devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices of a topology, to compile for.

    Raises:
        UsageError: if there is no such topology, or no libtpu.
    """
    options: dict[str, Any] = dict(find(topology).options)
    if slices < 1:
        raise UsageError(f"--slices is {slices}; expected 1 or more")
    if slices > 1:
        options["num_slices"] = slices
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "planning needs libtpu, the compiler for TPUs, which is not installed; "
            "on Linux, in the clone: pip install -e '.[tpu]'"
        )
    with _environment():
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    return description.devices


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({**_ENVIRONMENT, **before})
    try:
        yield
    finally:
        for name in _ENVIRONMENT.keys() - before.keys():
            del os.environ[name]
