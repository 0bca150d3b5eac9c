"""HLO, the language of compiled programs, read from its text; and how often each part runs."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from jetflow.flows.autoregressive import SETTLES

_CALLED = re.compile(
    r"(?:condition|body|calls|to_apply|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_SETTLED = rf'op_name="[^"]*/{SETTLES}(\d+)/'
_CALLERS = ("while", "fusion", "call", "conditional", "async-start")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array, `bf16[64,256]{1,0:T(8,128)S(1)}` in HLO's notation."""

    dtype: str  # "bf16"
    shape: tuple[int, ...]
    size: float  # in bytes, with what fills up its tiles
    hbm_bytes: float  # the same in main memory, 0 in another memory space (`S(1)` above)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: tuple[Array, ...]  # of a tuple, all arrays in it
    operands: tuple[str, ...]
    arguments: str  # between the parentheses
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def reference(self, name: str) -> str:
        """The computation that an attribute names."""
        return self.attribute(rf"{name}=%?([\w.\-]+)") or ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    root: Instruction

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self[instruction.operands[index]]

    def origin(self, instruction: Instruction) -> Instruction:
        """What an instruction is a copy, or another view, of."""
        while instruction.opcode in ("bitcast", "copy", "reshape"):
            instruction = self.operand(instruction, 0)
        return instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By name, the instructions that take it; a bitcast's users count as its operand's."""
        users = collections.defaultdict(list)
        for instruction in reversed(self.values()):
            for name in dict.fromkeys(instruction.operands):
                is_view = instruction.opcode == "bitcast"
                users[name] += users[instruction.name] if is_view else [instruction]
        return users


Program = dict[str, Computation]


def parse(text: str) -> Program:
    """Computations by name; the one that a program starts with is also under "ENTRY"."""
    program: Program = {}
    computation = Computation()
    # Of a kernel, XLA writes what is in its metadata over several lines.
    for line in re.sub(r'\n(?="|}})', "", text).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = program[header[2]] = Computation()
            if header[1]:
                program["ENTRY"] = computation
        elif start := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            instruction = _instruction(start[2], line[start.end() :])
            computation[instruction.name] = instruction
            if start[1]:
                computation.root = instruction
    return program


def executions(program: Program, sweeps: float = 0.0) -> Iterator[tuple[Computation, int, bool]]:
    """Each computation, how often it runs, and whether in a fusion: once a place that calls it.

    Args:
        sweeps: how often the body of a loop runs whose length the program does not fix, as a
            share of the tokens that it settles; of other loops, once.
    """
    waiting = [(program["ENTRY"], 1, False)]
    while waiting:
        computation, times, is_fused = waiting.pop()
        yield computation, times, is_fused
        for instruction in computation.values():
            if instruction.opcode not in _CALLERS:
                continue
            is_loop = instruction.opcode == "while"
            known = trip_count(program, computation, instruction) if is_loop else 1
            settled = int(instruction.attribute(_SETTLED) or 0)
            trips = times * (max(1, round(sweeps * settled)) if known is None else known)
            inner = is_fused or instruction.opcode == "fusion"
            for several, one in _CALLED.findall(instruction.attributes):
                names = re.findall(r"[\w.\-]+", several or one)
                waiting += [(program[name], trips, inner) for name in names]


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a while loop runs; None where the program does not fix it.

    On some platforms XLA notes it. Otherwise it follows from a counter that the loop's condition
    compares with a constant.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (program[loop.reference(name)] for name in ("condition", "body"))
    test = condition.root
    if test.opcode != "compare" or test.attribute(r"direction=(\w+)") != "LT":
        return None
    place = condition.origin(condition.operand(test, 0)).attribute(r"index=(\d+)")
    bound = _constant(condition, condition.operand(test, 1))
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


# [2,2,2]T(1,0,2): the numbers from 0 on, reshaped and transposed.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESH = re.compile(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}")
_TABLE = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}")


def replica_groups(attributes: str, devices: int) -> Int[np.ndarray, "G N"]:
    """The devices that each group of a collective joins, in each of HLO's notations."""
    if mesh := _MESH.search(attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        joined = re.findall(r"'(\w+)'", mesh[4])
        ids = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3]).reshape(*sizes.values())
        axes = [list(sizes).index(axis) for axis in joined]
        ids = np.moveaxis(ids, axes, range(-len(axes), 0))
        return ids.reshape(-1, math.prod(sizes[axis] for axis in joined))
    if table := _TABLE.search(attributes):
        return _iota(table[2], table[3]).reshape(numbers(table[1]))
    if lists := _LISTS.search(attributes):
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])])
    return np.arange(devices)[None]


def _iota(shape: str, order: str | None) -> Int[np.ndarray, "..."]:
    ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return ids.transpose(numbers(order)) if order else ids


def numbers(text: str | None) -> list[int]:
    """The numbers of a list in HLO's notation, "0,2,1"."""
    return [int(number) for number in (text or "").split(",") if number]


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    origin = computation.origin(instruction)
    number = re.fullmatch(r"-?\d+", origin.arguments)
    return int(number[0]) if origin.opcode == "constant" and number else None


def _instruction(name: str, text: str) -> Instruction:
    """Parse what follows `name = `: type opcode(operands), attributes."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    last = _closing("(" + rest) - 1
    arguments, attributes = rest[: last - 1], rest[last:]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode, _arrays(text[:end]), operands, arguments, attributes)


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, lengths, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        each = int(bits[1]) / 8 if bits else float(dtype == "pred")  # a token has no bytes
        size = math.prod(_padded(numbers(lengths), layout)) * each
        elsewhere = re.search(r"S\([1-9]", layout)
        arrays.append(Array(dtype, tuple(numbers(lengths)), size, 0.0 if elsewhere else size))
    return tuple(arrays)


def _padded(shape: list[int], layout: str) -> list[int]:
    """The shape in whole tiles, of `T(8,128)` say along the axes that the layout names first."""
    tile, padded = re.search(r"T\(([\d,]+)\)", layout), list(shape)
    order = numbers((re.match(r"\{([\d,]*)", layout) or [""])[1]) if tile else []
    for axis, length in zip(order, reversed(numbers(tile[1] if tile else "")), strict=False):
        padded[axis] = -(-shape[axis] // length) * length
    return padded
