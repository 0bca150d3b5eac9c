"""What a compiled program costs: FLOPs, bytes and collectives, each loop by its trip count.

XLA's own `cost_analysis` counts the body of a loop once, and a flow that scans over its layers is
all loops. The formulas for convolutions and slices are those of XLA's HloCostAnalysis. On TPUs
every matrix product is a convolution; on GPUs many are calls of cuBLAS, and bytes that a cache
saves are counted as if they came from memory.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jetflow.nn.attention import tile
from jetflow.tools.plan import hlo
from jetflow.tools.plan.hlo import Computation, Instruction, Program

BETWEEN_SLICES, BETWEEN_NODES = " between slices", " between nodes"
BETWEEN = (BETWEEN_SLICES, BETWEEN_NODES)
CUDNN_TILE = 128  # queries and keys that its kernel takes at a time, or skips where all are masked

# Instructions that name, start or await the work of others and move no bytes themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "iota",
    "conditional", "after-all", "partition-id", "replica-id", "send", "recv", "opt-barrier",
    "async-start", "async-update",
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

    kind: str  # as XLA names it, "all-reduce", or with a suffix of `BETWEEN`
    count: int  # of executions
    bytes: float  # sent by each device in all of them, around a ring


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one execution costs on each device."""

    flops: float  # of matrix products and convolutions: two per multiplication with addition
    flops_by_arithmetic: dict[str, float]  # "bfloat16", or "float32" with a precision
    hbm_bytes: float  # read from and written to main memory, with padding
    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops of unknown length, counted as `cost` says


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


def cost(text: str, devices: int, slices: int = 1, nodes: int = 1, sweeps: float = 0.0) -> Cost:
    """The cost of a compiled program by its HLO text.

    Args:
        devices: over all slices or nodes.
        slices: parts of the devices that a slower network joins, of TPUs.
        nodes: the same of GPUs, in their order.
        sweeps: of windows, as a share of the tokens, see `hlo.executions`.
    """
    program = hlo.parse(text)
    hbm_bytes = 0.0
    flops: dict[str, float] = collections.defaultdict(float)
    exchanges: dict[tuple, tuple[int, float]] = {}  # how often, and bytes
    unknown = 0
    for computation, times, is_fused in hlo.executions(program, sweeps):
        for instruction in computation.values():
            if products := _flops(computation, instruction):
                flops[_arithmetic(computation, instruction)] += times * products
            if instruction.opcode == "while":
                unknown += hlo.trip_count(program, computation, instruction) is None
            if not is_fused:
                hbm_bytes += times * _traffic(program, computation, instruction)
            for kind, size in _exchanges(computation, instruction, devices, slices, nodes):
                # An asynchronous one is spread over several fusions of one channel and origin.
                channel = instruction.attribute(r"channel_id=(\d+)") if is_fused else None
                key = kind, channel or instruction.name, instruction.attribute(r'op_name="(.*?)"')
                count, most = exchanges.get(key, (0, 0.0))
                exchanges[key] = max(times, count), max(size, most)
    collectives = []
    for kind in sorted({kind for kind, *_ in exchanges}):
        counts = [(count, size) for (name, *_), (count, size) in exchanges.items() if name == kind]
        sent = float(sum(count * size for count, size in counts))
        collectives.append(Collective(kind, sum(count for count, _ in counts), sent))
    return Cost(sum(flops.values()), dict(flops), hbm_bytes, tuple(collectives), unknown)


# Collectives


def _exchanges(
    computation: Computation, instruction: Instruction, devices: int, slices: int, nodes: int
) -> Iterator[tuple[str, float]]:
    """The kind of a collective and the bytes that a device sends; nothing of other instructions.

    Between slices of TPUs XLA writes collectives as transfers of hosts. Of GPUs a group that spans
    nodes is a ring through all its members; one ring for each that a node has, side by side, as
    each GPU has a network card. So a device sends all its bytes to its neighbours in the node, and
    its share of them over the network. An all-to-all is no ring: most of it crosses the network.
    """
    if instruction.opcode == "send":
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if kind is not None:
            kind = kind.lower().replace("_", "-")
            sent = _SENT.get(kind, _SENT["collective-permute"])(slices)
            yield kind + BETWEEN_SLICES, computation.operand(instruction, 0).result[0].size * sent
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return
    size = sum(array.size for name in instruction.operands for array in computation[name].result)
    groups = hlo.replica_groups(instruction.attributes, devices)
    size *= _SENT[kind](groups.shape[1])
    spanned = max(len(set(group)) for group in (groups // (devices // nodes)).tolist())
    rings = groups.shape[1] // spanned
    if spanned == 1 or rings > 1:
        yield kind, size
    if spanned > 1:
        yield kind + BETWEEN_NODES, size / (1 if kind == "all-to-all" else rings)


# FLOPs


def _flops(computation: Computation, instruction: Instruction) -> float:
    """Of one execution: of matrix products, convolutions, and kernels that consist of them."""
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "dot":
        return _product_flops(computation, instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
    if instruction.opcode != "custom-call":
        return 0.0
    if instruction.attribute(r'custom_call_target="(__cublas[^"]*)"'):
        return _product_flops(
            computation, instruction, r'lhs_contracting_dimensions":\[([\d,"]*)\]'
        )
    return _attention_flops(computation, instruction)


def _arithmetic(computation: Computation, product: Instruction) -> str:
    """How it multiplies: "bfloat16", or "float32" with its precision."""
    if not any(computation.operand(product, side).result[0].dtype == "f32" for side in (0, 1)):
        return "bfloat16"
    precision = product.attribute(r'operand_precision"?[:=][\[{]"?(\w+)')
    return f"float32 {(precision or 'default').lower()}"


def _product_flops(computation: Computation, product: Instruction, summed: str) -> float:
    left = computation.operand(product, 0).result[0].shape
    axes = hlo.numbers((product.attribute(summed) or "").replace('"', ""))
    return 2.0 * math.prod(product.result[0].shape) * math.prod(left[axis] for axis in axes)


def _convolution_flops(computation: Computation, product: Instruction) -> float:
    left, right = (computation.operand(product, side).result[0].shape for side in (0, 1))
    result = product.result[0].shape
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


def _attention_flops(computation: Computation, call: Instruction) -> float:
    """Of a fused kernel, which XLA does not look into: by its tiles that are not all masked.

    Forwards it multiplies twice, backwards five times: the logits and their gradient, and the
    gradients of queries, keys and values.
    """
    splash = re.match(r"splash_mha_(fwd|dkv)", call.name)
    cudnn = call.attribute(r'custom_call_target="__cudnn\$fmha(\w+)"')
    if not (splash or cudnn):
        return 0.0
    shapes = [computation[name].result[0].shape for name in call.operands]
    batch, heads, head_dim, tokens = next(shape for shape in shapes if len(shape) == 4)
    # Of cuDNN's the order of heads and tokens is not in the shape, and the width comes last.
    logits = call.attribute(r'intermediate_tensor_shape":.*?"dimensions":\s*\[([\d,"\s]*)\]')
    if cudnn:
        head_dim, heads, tokens = tokens, *map(int, re.findall(r"\d+", logits or "")[1:3])
    is_causal = call.attribute(r'(/causal/|"mask_type":\s*"CAUSAL")')
    tiles = -(-tokens // (tile(tokens) if splash else CUDNN_TILE))
    share = (tiles + 1) / (2 * tiles) if is_causal else 1.0
    is_forward = splash[1] == "fwd" if splash else "Backward" not in (cudnn or "")
    return (2 if is_forward else 5) * share * 2.0 * batch * heads * tokens**2 * head_dim


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
    if opcode == "copy-start":
        return operands[0].result[0].hbm_bytes + instruction.result[0].hbm_bytes
    if opcode.endswith("-start"):  # the result holds the operands too, but for an all-reduce's
        count = len(operands)
        targets = instruction.result[count : 2 * count] or instruction.result
        read = targets if opcode == "slice-start" else [operand.result[0] for operand in operands]
        in_memory = all(operand.result[0].hbm_bytes for operand in operands)
        moved = sum(array.size for array in read) if in_memory else 0.0
        return moved + sum(array.hbm_bytes for array in targets)
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
