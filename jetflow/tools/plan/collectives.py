"""The exchanges between devices of a compiled program, and the bytes that each takes."""

import math
import re
from collections.abc import Callable

from jetflow.tools.plan.hlo import Computation, Instruction, numbers

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
BETWEEN_SLICES = "between slices"


def exchange(
    computation: Computation, instruction: Instruction, devices: int, slices: int
) -> tuple[str, float] | None:
    """Kind of a collective, and the bytes that a device sends in it; None for what is none.

    The kind is one of `COLLECTIVES`, or "all-reduce between slices".
    """
    if instruction.opcode == "send":
        # Between slices XLA writes collectives as transfers by the host.
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if kind is None:
            return None
        kind = kind.lower().replace("_", "-")
        size = computation.operand(instruction, 0).result[0].size
        return f"{kind} {BETWEEN_SLICES}", size * _SENT.get(kind, _SENT["collective-permute"])(
            slices
        )
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    size = sum(array.size for name in instruction.operands for array in computation[name].result)
    members = _group_size(instruction.attributes, devices)
    return kind, size * _SENT[kind](members)


# Bytes that a device of n sends round a ring, per byte of its operand.
_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


def _group_size(attributes: str, devices: int) -> int:
    """Devices that a collective joins, in each of HLO's three writings."""
    groups = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)
    if groups:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(groups[1])
    groups = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(numbers(groups[1])) if groups else devices
