"""Accelerators: peak figures, topologies, and devices to compile for on a machine without them.

Peak figures are those of Google's documentation (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e,
tpu7x), and of NVIDIA's data sheets for the SXM boards: dense products, without sparsity. Memory is
what the compiler (libtpu 0.0.42) leaves to a program, and what XLA's own descriptions of NVIDIA's
boards state.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from jax._src import xla_bridge
from jax.experimental import topologies

from jetflow.types import UsageError

# Answers to what libtpu and the CUDA plugin ask of the machine, where that has no accelerator.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
_WITHOUT_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A JAX device: a TPU chip, or half of one of tpu7x, or a GPU."""

    kind: str  # JAX's `device_kind`
    hbm_bytes: int  # memory for a program; of a GPU, for all programs
    flops: float  # peak of bfloat16 matrix products, a second
    hbm_bandwidth: float  # bytes a second to and from that memory
    link_bandwidth: float  # bytes a second sent within the slice or node, over all links
    network_bandwidth: float  # bytes a second sent to others: the device's share of the network
    topologies: tuple[str, ...]  # shapes of a slice, in chips, or examples of nodes x GPUs
    float32_flops: tuple[float, float, float]  # peaks at precision default, high and highest
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of libtpu
    chip: str = ""  # of a GPU, as XLA describes it

    @property
    def capacity(self) -> int:
        """Memory for a program: of a GPU, the share that JAX allocates."""
        return int(self.hbm_bytes * _memory_share()) if self.chip else self.hbm_bytes

    def peak(self, arithmetic: str) -> float:
        """FLOPs a second of matrix products: "bfloat16", or "float32" with a precision."""
        _, _, precision = arithmetic.partition(" ")
        precisions = ("default", "high", "highest")
        return self.float32_flops[precisions.index(precision)] if precision else self.flops


_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BLOCKS = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8",
    "8x8x12", "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip
_MEGACORE = {"chip_config_name": "megacore"}
_NODES = ("1", "8", "2x8")
_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the older name
_GIB = 2**30


def _tpu(kind: str, gib: float, flops: float, hbm, ici, dcn, shapes, options=None) -> Accelerator:
    # A float32 product is one pass of bfloat16 ones, three at precision high, six at highest.
    float32 = (flops, flops / 3, flops / 6)
    return Accelerator(kind, int(gib * _GIB), flops, hbm, ici, dcn, shapes, float32, options or {})


def _gpu(kind: str, memory: int, flops: float, tf32, float32, hbm, nvlink, network, chip):
    peaks = (tf32, tf32, float32)  # below highest, a float32 product is one of TF32
    return Accelerator(kind, memory, flops, hbm, nvlink, network, _NODES, peaks, chip=chip)


_AMPERE = (
    "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 "
    "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040"
)
_HOPPER = (
    "cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 "
    "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800"
)
_BLACKWELL = (
    "cuda_compute_capability { major: 10 } core_count: 148 fpus_per_core: 128 clock_rate_ghz: 1.965"
    " shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 132644864"
)
_ANY_CHIP = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
    "shared_memory_per_block: 49152"
)

ACCELERATORS = {
    "v4": _tpu("TPU v4", 30.75, 275e12, 1228e9, 300e9, 6.25e9, _BLOCKS, _MEGACORE),
    "v5e": _tpu("TPU v5 lite", 15.75, 197e12, 819e9, 200e9, 3.125e9, _PLANES),
    "v5p": _tpu("TPU v5", 95.74, 459e12, 2765e9, 600e9, 6.25e9, _BLOCKS),
    "v6e": _tpu("TPU v6 lite", 31.25, 918e12, 1638e9, 400e9, 12.5e9, _PLANES),
    "tpu7x": _tpu("TPU7x", 94.75, 1153.5e12, 3690e9, 300e9, 6.25e9, _BLOCKS),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 85_100_068_864,
                 312e12, 156e12, 19.5e12, 2039e9, 300e9, 25e9, _AMPERE),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 84_942_979_072,
                 989.4e12, 494.7e12, 67e12, 3350e9, 450e9, 50e9, _HOPPER),
    "h200": _gpu("NVIDIA H200", 151_397_597_184,
                 989.4e12, 494.7e12, 67e12, 4800e9, 450e9, 50e9, _HOPPER),
    "b200": _gpu("NVIDIA B200", 191_514_411_008,
                 2250e12, 1125e12, 75e12, 8000e9, 900e9, 50e9, _BLACKWELL),
}  # fmt: skip


def find(topology: str) -> Accelerator:
    """The accelerator of a topology: `v5e:4x4`, in chips, or `h100:2x8`, nodes x GPUs.

    Raises:
        UsageError: if there is no such topology; names those that exist.
    """
    generation, _, shape = topology.partition(":")
    accelerator = ACCELERATORS.get(generation)
    if not accelerator or not (
        shape in accelerator.topologies or (accelerator.chip and gpus(shape))
    ):
        some = {generation: accelerator} if accelerator else ACCELERATORS
        known = "; ".join(f"{name}:{' '.join(a.topologies)}" for name, a in some.items())
        raise UsageError(
            f"topology is {topology!r}; expected GENERATION:SHAPE, as in v5e:4x4, or of GPUs "
            f"NODESxGPUS with 1 to 8 GPUs a node, as in h100:2x8, of {known}"
        )
    return accelerator


def chips(topology: str, slices: int = 1) -> int:
    """TPU chips, or GPUs, of so many slices of a topology."""
    return slices * math.prod(map(int, topology.partition(":")[2].split("x")))


def gpus(shape: str) -> tuple[int, int] | None:
    """Nodes, and GPUs a node, of a shape such as "2x8", or "8" for one node."""
    match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-8])", shape)
    return (int(match[1] or 1), int(match[2])) if match else None


def devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices of a topology, to compile for.

    Raises:
        UsageError: if there is no such topology, or not the compiler for it.
    """
    accelerator = find(topology)
    if slices < 1:
        raise UsageError(f"slices is {slices}; expected 1 or more")
    silence_compilers()
    if accelerator.chip:
        return _gpu_devices(topology, accelerator, slices)
    options = dict(accelerator.options)
    if slices > 1:
        options["num_slices"] = slices
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "planning needs libtpu, the compiler for TPUs, which is not installed; "
            "on Linux, in the clone: pip install -e '.[tpu]'"
        )
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compile beside other processes
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return description.devices


def _gpu_devices(topology: str, accelerator: Accelerator, slices: int) -> Sequence[Any]:
    name, _, shape = topology.partition(":")
    nodes, each = gpus(shape) or (1, 1)
    _memory_share()  # a bad one is refused before the plugin reads it
    if slices > 1:
        raise UsageError(
            f"slices is {slices}, which is for TPUs; of GPUs the topology has the nodes, as in "
            f"{name}:{slices * nodes}x{each}"
        )
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"1x{nodes}x{each}",
            target_config=_target(accelerator),
        )
    except NotImplementedError as error:
        raise UsageError(
            "planning for GPUs needs JAX's CUDA plugin, which is not installed; "
            "on Linux, in the clone: pip install -e '.[cuda12]'"
        ) from error
    return description.devices


def _memory_share() -> float:
    """What JAX allocates of a GPU's memory."""
    given = {name: os.environ.get(name) for name in _MEMORY_SHARES}
    name, text = next((pair for pair in given.items() if pair[1]), ("", "0.75"))
    if not re.fullmatch(r"0?\.0*[1-9]\d*|1\.?0*", text or ""):
        raise UsageError(f"{name} is {text!r}; expected a share of the memory, such as 0.75")
    return float(text or 0)


def _target(gpu: Accelerator) -> str:
    """The description of a GPU that XLA compiles for, a GpuTargetConfigProto."""
    memory = f"memory_bandwidth: {gpu.hbm_bandwidth:.0f} device_memory_size: {gpu.hbm_bytes}"
    return f"""gpu_device_info {{ {_ANY_CHIP} {gpu.chip} {memory} }} platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
    device_description_str: "{gpu.kind}"
"""


@contextlib.contextmanager
def compiling(accelerator: Accelerator) -> Iterator[None]:
    """Inside, programs for the accelerator's devices can be lowered and compiled.

    JAX looks among the GPUs of this machine which vendor's platform "gpu" is, and refuses where
    there are none (github.com/jax-ml/jax/issues/23971). Here it is "cuda".
    """
    real, name = xla_bridge.canonicalize_platform, "canonicalize_platform"
    patched = mock.patch.object(xla_bridge, name, lambda p: "cuda" if p == "gpu" else real(p))
    with patched if accelerator.chip else contextlib.nullcontext():
        yield


def silence_compilers() -> None:
    """Keep an installed libtpu or CUDA plugin from filling stderr on a machine without either.

    JAX tries both when it first looks for devices, unless JAX_PLATFORMS names others.
    """
    answers = {}
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
        answers |= _WITHOUT_TPU
    if not glob.glob("/dev/nvidia*"):
        answers |= _WITHOUT_GPU
    for name, value in answers.items():
        os.environ.setdefault(name, value)
