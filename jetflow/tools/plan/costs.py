"""What a compiled program costs: FLOPs, bytes and collectives, each loop by its trip count.

XLA's own `cost_analysis` counts the body of a loop once, and a flow that scans over its layers is
all loops. The formulas for convolutions and slices are those of XLA's HloCostAnalysis. On TPUs
every matrix product is a convolution.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jetflow.nn.attention import LARGEST_BLOCK
from jetflow.tools.plan import hlo
from jetflow.tools.plan.hlo import Computation, Instruction, Program, numbers

BETWEEN_SLICES = "between slices"

# Instructions that name, start or await the work of others and move no bytes themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "iota",
    "conditional", "after-all", "partition-id", "replica-id", "send", "recv", "opt-barrier",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")

# Bytes that each of n devices sends around a ring, per byte of its operand.
_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The exchanges of one kind in a program."""

    kind: str  # as XLA names it, "all-reduce", or with the suffix "between slices"
    count: int  # of executions
    bytes: float  # sent by each device in all of them, around a ring


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one execution costs on each device."""

    flops: float  # of matrix products and convolutions: two per multiplication with addition
    hbm_bytes: float  # read from and written to main memory, without padding
    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops of unknown length, counted as `cost` says


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory of a device at the moment of largest use, with the program's own code."""
    # The sum of arguments, results and `temp_size_in_bytes` is more than is ever in use at once.
    memory: Any = compiled.memory_analysis()
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def forward_flops(params: Any, tokens: int) -> float:
    """FLOPs of the nets' matrix products for one image: two per multiplication with addition.

    With T tokens a matrix [M, N] takes 2·T·M·N, and a layer's attention of width W 4·T²·W, which
    includes the masked products of a token with later ones.
    """
    total = 0.0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/kernel"):
            total += 2.0 * tokens * math.prod(leaf.shape)
        if name.endswith("/qkv/kernel"):
            total += 4.0 * tokens**2 * leaf.shape[-1] * math.prod(leaf.shape[:-3])
    return total


def cost(text: str, devices: int, slices: int = 1, sweeps: int = 1) -> Cost:
    """The cost of a compiled program by its HLO text.

    Args:
        devices: over all slices.
        slices: parts of the devices that a slower network joins.
        sweeps: how often the body of a loop of unknown length runs.
    """
    program = hlo.parse(text)
    flops = hbm_bytes = 0.0
    exchanges: dict[tuple, tuple[int, float]] = {}  # how often, and bytes
    unknown = 0
    for computation, times, is_fused in hlo.executions(program, sweeps):
        for instruction in computation.values():
            if instruction.opcode in ("convolution", "dot"):
                flops += times * _flops(computation, instruction)
            if instruction.opcode == "custom-call":
                flops += times * _kernel_flops(computation, instruction)
            if instruction.opcode == "while":
                unknown += hlo.trip_count(program, computation, instruction) is None
            if not is_fused:
                hbm_bytes += times * _traffic(program, computation, instruction)
            if exchange := _exchange(computation, instruction, devices, slices):
                kind, size = exchange
                # An asynchronous one is spread over several fusions of one channel and origin.
                channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
                key = kind, channel, instruction.attribute(r'op_name="([^"]*)"')
                count, most = exchanges.get(key, (0, 0.0))
                exchanges[key] = max(times, count), max(size, most)
    collectives = []
    for kind in sorted({kind for kind, *_ in exchanges}):
        counts = [(count, size) for (name, *_), (count, size) in exchanges.items() if name == kind]
        sent = float(sum(count * size for count, size in counts))
        collectives.append(Collective(kind, sum(count for count, _ in counts), sent))
    return Cost(flops, hbm_bytes, tuple(collectives), unknown)


# Collectives


def _exchange(
    computation: Computation, instruction: Instruction, devices: int, slices: int
) -> tuple[str, float] | None:
    """The kind of a collective and the bytes that a device sends; None for other instructions."""
    if instruction.opcode == "send":  # between slices XLA writes collectives as host transfers
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if kind is None:
            return None
        kind = kind.lower().replace("_", "-")
        sent = _SENT.get(kind, _SENT["collective-permute"])(slices)
        return f"{kind} {BETWEEN_SLICES}", computation.operand(instruction, 0).result[0].size * sent
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return None
    size = sum(array.size for name in instruction.operands for array in computation[name].result)
    return kind, size * _SENT[kind](_group_size(instruction.attributes, devices))


def _group_size(attributes: str, devices: int) -> int:
    """Devices that a collective joins, in each of HLO's three notations."""
    if groups := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(groups[1])
    groups = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(numbers(groups[1])) if groups else devices


# FLOPs


def _flops(computation: Computation, product: Instruction) -> float:
    left, right = (computation.operand(product, side).result[0].shape for side in (0, 1))
    result = product.result[0].shape
    if product.opcode == "dot":
        summed = numbers(product.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2.0 * math.prod(result) * math.prod(left[axis] for axis in summed)
    labels = product.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
    of_left, of_right, of_result = re.split(r"_|->", labels)
    total = 2.0 * result[of_result.index("b")] * result[of_result.index("f")]
    total *= right[of_right.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", product.attribute(r"window=\{(.*?)\}") or ""))
    for axis in range(len(of_left) - 2):
        place = str(axis)
        total *= _window_products(
            left[of_left.index(place)],
            right[of_right.index(place)],
            result[of_result.index(place)],
            **{name: text.split("x")[axis] for name, text in window.items() if name in _WINDOW},
        )
    return total / int(product.attribute(r"batch_group_count=(\d+)") or 1)


def _kernel_flops(computation: Computation, call: Instruction) -> float:
    """Of Splash attention, whose kernels XLA does not look into: by its tiles that are not masked.

    Forwards it multiplies twice, backwards five times: the logits and their gradient, and the
    gradients of queries, keys and values.
    """
    kernel = re.match(r"splash_mha_(fwd|dkv)", call.name)
    if not kernel:
        return 0.0
    shapes = [computation[name].result[0].shape for name in call.operands]
    batch, heads, tokens, head_dim = next(shape for shape in shapes if len(shape) == 4)
    tiles = -(-tokens // LARGEST_BLOCK)
    share = (tiles + 1) / (2 * tiles) if call.attribute(r"(/causal/)") else 1.0
    products = 2 if kernel[1] == "fwd" else 5
    return products * share * 2.0 * batch * heads * tokens**2 * head_dim


def _window_products(
    left: int, right: int, result: int, stride="1", pad="0_0", lhs_dilate="1", rhs_dilate="1"
) -> int:
    """Pairs of an output and a window position that meet an element of the input, on one axis."""
    outputs, taps = np.arange(result)[:, None], np.arange(right)[None]
    place = outputs * int(stride) + taps * int(rhs_dilate) - int(pad.split("_")[0])
    inside = (place >= 0) & (place < (left - 1) * int(lhs_dilate) + 1)
    return int(np.sum(inside & (place % int(lhs_dilate) == 0)))


# Bytes


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from main memory and writes to it."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = [computation[name] for name in instruction.operands]
    if opcode == "fusion":
        inside = program[instruction.reference("calls")]
        read = sum(
            _read(inside, parameter, operands[int(parameter.arguments)])
            for parameter in inside.values()
            if parameter.opcode == "parameter"
        )
        return read + _written(inside, instruction)
    if opcode.endswith("-start"):  # the result holds the operands too
        target = instruction.result[0 if opcode == "copy-start" else len(operands)]
        source = operands[0].result[0]
        moved = target.size if opcode == "slice-start" else source.size
        return (moved if source.hbm_bytes else 0.0) + target.hbm_bytes
    if opcode in _SLICES:
        moved = instruction.result[0]
        return moved.hbm_bytes + (moved.size if operands[0].result[0].hbm_bytes else 0.0)
    if opcode == "dynamic-update-slice":
        update = operands[1].result[0]
        return update.hbm_bytes + (update.size if instruction.result[0].hbm_bytes else 0.0)
    arrays = [*instruction.result, *(array for operand in operands for array in operand.result)]
    return sum(array.hbm_bytes for array in arrays)


def _read(inside: Computation, parameter: Instruction, operand: Instruction) -> float:
    """Bytes that a fusion reads of an operand: if it only slices the operand, the slices."""
    size = sum(array.size for array in operand.result)
    share = sum(array.hbm_bytes for array in operand.result) / size if size else 0.0
    total = 0.0
    for user in inside.users[parameter.name]:
        is_target = bool(user.operands) and inside.origin(inside.operand(user, 0)) is parameter
        if user.opcode in _SLICES and is_target:
            total += sum(array.size for array in user.result)
        elif user.opcode != "tuple" and not (user.opcode == "dynamic-update-slice" and is_target):
            return share * sum(array.size for array in parameter.result)
    return share * total


def _written(inside: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion writes: of an array that it updates in place, the update."""
    root = inside.root
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for part, array in zip(parts, fusion.result, strict=False):
        origin = inside.origin(part)
        if origin.opcode == "dynamic-update-slice":
            updated = inside.operand(origin, 1).result[0].size
            total += updated if array.hbm_bytes else 0.0
        elif origin.opcode != "parameter" or origin is root:
            total += array.hbm_bytes
    return total
