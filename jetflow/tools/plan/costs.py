"""What a compiled program does: from its HLO, each loop counted as often as it runs.

XLA's own `cost_analysis` counts the body of a loop once, and a flow that scans over its layers is
all loops. The formulas for convolutions and slices are those of XLA's HloCostAnalysis; on TPUs
every matrix product is a convolution.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jetflow.tools.plan.collectives import exchange
from jetflow.tools.plan.hlo import Computation, Instruction, numbers, parse

# Instructions that name, start or await what others compute, and move no bytes themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "iota",
    "conditional", "after-all", "partition-id", "replica-id", "send", "recv", "opt-barrier",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind in a program.

    Attributes:
        kind: see `collectives.exchange`.
        count: how many are executed.
        bytes: that each device sends in all of them, if they go round a ring.
    """

    kind: str
    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one execution costs on each device.

    Attributes:
        flops: of matrix products and convolutions: two per multiplication with addition.
        hbm_bytes: read from and written to the device's main memory, without padding.
        collectives: exchanges with other devices.
        unknown_loops: loops of unknown length, counted as if their body ran once.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory of a device at the moment when the program uses most, its own code included."""
    # The sum of arguments, results and `temp_size_in_bytes` is more than is ever in use at once.
    memory: Any = compiled.memory_analysis()
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def forward_flops(params: Any, tokens: int) -> float:
    """Of one image through a flow: two for each multiplication with addition in its nets' matrices.

    With T tokens a matrix [M, N] takes 2·T·M·N, and a layer's attention of width W 4·T²·W, where
    the products of a token with later ones, which are masked, count as well.
    """
    total = 0.0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/kernel"):
            total += 2.0 * tokens * math.prod(leaf.shape)
        if name.endswith("/qkv/kernel"):
            width = leaf.shape[-2]
            layers = math.prod(leaf.shape[:-2])
            total += 4.0 * tokens**2 * width * layers
    return total


def cost(text: str, devices: int, slices: int = 1) -> Cost:
    """The cost of a compiled program, given its text.

    Args:
        devices: that it runs on, over all slices.
        slices: that a slower network joins.
    """
    program = parse(text)
    flops = hbm_bytes = 0.0
    exchanges: dict[str, tuple[str, int, float]] = {}
    unknown = 0
    for computation, times, is_fused in _executions(program):
        for instruction in computation.values():
            if instruction.opcode in ("convolution", "dot"):
                flops += times * _flops(computation, instruction)
            elif (
                instruction.opcode == "while" and _trips(program, computation, instruction) is None
            ):
                unknown += 1
            if not is_fused:
                hbm_bytes += times * _traffic(program, computation, instruction)
            if found := exchange(computation, instruction, devices, slices):
                kind, sent = found
                # An asynchronous one is spread over several fusions, all with its channel.
                channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
                before = exchanges.get(channel, (kind, 0, 0.0))
                exchanges[channel] = (kind, max(times, before[1]), max(sent, before[2]))
    kinds = sorted({kind for kind, _, _ in exchanges.values()})
    of_kind = {kind: [found for found in exchanges.values() if found[0] == kind] for kind in kinds}
    collected = tuple(
        Collective(
            kind,
            count=sum(count for _, count, _ in found),
            bytes=float(sum(count * sent for _, count, sent in found)),
        )
        for kind, found in of_kind.items()
    )
    return Cost(flops, hbm_bytes, collected, unknown)


# How often


def _executions(program: dict[str, Computation]) -> Iterator[tuple[Computation, int, bool]]:
    """Each computation with how often it runs, per place that it is called from."""
    waiting = [(program["ENTRY"], 1, False)]
    while waiting:
        computation, times, is_fused = waiting.pop()
        yield computation, times, is_fused
        for instruction in computation.values():
            called: list[str] = []
            trips = 1
            if instruction.opcode == "while":
                trips = _trips(program, computation, instruction) or 1
                called = re.findall(r"(?:condition|body)=%?([\w.\-]+)", instruction.attributes)
            elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                names = r"(?:calls|to_apply|\w+_computations?)=\{?((?:%?[\w.\-]+(?:, )?)+)"
                for listed in re.findall(names, instruction.attributes):
                    called += [name.strip(" %") for name in listed.split(",")]
            inner = is_fused or instruction.opcode == "fusion"
            waiting += [(program[name], times * trips, inner) for name in called if name in program]


def _trips(
    program: dict[str, Computation], computation: Computation, loop: Instruction
) -> int | None:
    """How often the body of a while loop runs; None where the program does not fix it.

    XLA says it on some platforms. Else it follows from a counter that the condition compares with a
    constant.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = program[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
    body = program[loop.attribute(r"body=%?([\w.\-]+)") or ""]
    test = condition.root
    if test.opcode != "compare" or test.attribute(r"direction=(\w+)") != "LT":
        return None
    counter = condition.origin(condition.operand(test, 0))
    bound = _constant(condition, condition.operand(test, 1))
    place = counter.attribute(r"index=(\d+)")
    inputs = computation.origin(computation.operand(loop, 0))
    if place is None or bound is None or {inputs.opcode, body.root.opcode} != {"tuple"}:
        return None
    start = _constant(computation, computation.operand(inputs, int(place)))
    update = body.origin(body.operand(body.root, int(place)))
    if start is None or update.opcode != "add":
        return None
    steps = [_constant(body, body.operand(update, side)) for side in (0, 1)]
    step = next((step for step in steps if step), None)
    return None if step is None else max(0, -(-(bound - start) // step))


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    origin = computation.origin(instruction)
    number = re.fullmatch(r"-?\d+", origin.arguments)
    return int(number[0]) if origin.opcode == "constant" and number else None


# How much


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
        sizes = (left[of_left.index(str(axis))], right[of_right.index(str(axis))],
                 result[of_result.index(str(axis))])  # fmt: skip
        total *= _window_products(*sizes, **{
            name: text.split("x")[axis] for name, text in window.items() if name in _WINDOW
        })  # fmt: skip
    return total / int(product.attribute(r"batch_group_count=(\d+)") or 1)


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window_products(
    left: int, right: int, result: int, stride="1", pad="0_0", lhs_dilate="1", rhs_dilate="1"
) -> int:
    """Pairs of an output and a window position that meet an element of the input, on one axis."""
    outputs, taps = np.arange(result)[:, None], np.arange(right)[None]
    place = outputs * int(stride) + taps * int(rhs_dilate) - int(pad.split("_")[0])
    inside = (place >= 0) & (place < (left - 1) * int(lhs_dilate) + 1)
    return int(np.sum(inside & (place % int(lhs_dilate) == 0)))


def _traffic(
    program: dict[str, Computation], computation: Computation, instruction: Instruction
) -> float:
    """Bytes that an instruction reads from main memory and writes to it."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = [computation[name] for name in instruction.operands]
    if opcode == "fusion":
        inside = program[instruction.attribute(r"calls=%?([\w.\-]+)") or ""]
        read = sum(
            _read(inside, inner, min(1.0, _share_in_hbm(operands[int(inner.arguments)])))
            for inner in inside.values()
            if inner.opcode == "parameter"
        )
        return read + _written(inside, instruction)
    if opcode.endswith("-start"):  # its result holds its operands too
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


def _share_in_hbm(operand: Instruction) -> float:
    """The share of an operand's bytes that lies in main memory."""
    size = sum(array.size for array in operand.result)
    return sum(array.hbm_bytes for array in operand.result) / size if size else 0.0


def _read(inside: Computation, parameter: Instruction, share: float) -> float:
    """Bytes that a fusion reads of a parameter: of one that it only slices, the slices."""
    total = 0.0
    for user in inside.users[parameter.name]:
        target = inside.origin(inside.operand(user, 0)) if user.operands else None
        if user.opcode in _SLICES and target is parameter:
            total += sum(array.size for array in user.result)
        elif not (user.opcode == "tuple" or (
            user.opcode == "dynamic-update-slice" and target is parameter
        )):  # fmt: skip
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
