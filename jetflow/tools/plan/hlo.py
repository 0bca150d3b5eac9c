"""HLO, the language of compiled programs, read from its text."""

import collections
import dataclasses
import functools
import math
import re

_BYTES = {"pred": 1.0, "bf16": 2.0}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in HLO's writing: `bf16[64,256]{1,0:T(8,128)S(1)}`."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def size(self) -> float:
        """In bytes."""
        return math.prod(self.shape) * _bytes_of(self.dtype)

    @property
    def hbm_bytes(self) -> float:
        """Its bytes if it lies in main memory, which is space 0 and not named."""
        return 0.0 if re.search(r"S\([1-9]", self.layout) else self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: tuple[Array, ...]  # of a tuple, all arrays in it
    operands: tuple[str, ...]
    arguments: str  # between the parentheses
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.values() if instruction.is_root)

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self[instruction.operands[index]]

    def origin(self, instruction: Instruction) -> Instruction:
        """What an instruction is a copy, or another view, of."""
        while instruction.opcode in ("bitcast", "copy", "reshape"):
            instruction = self.operand(instruction, 0)
        return instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By name, the instructions that take it; a bitcast's users as its operand's own."""
        users = collections.defaultdict(list)
        for instruction in reversed(self.values()):
            for name in dict.fromkeys(instruction.operands):
                is_view = instruction.opcode == "bitcast"
                users[name] += users[instruction.name] if is_view else [instruction]
        return users


def parse(text: str) -> dict[str, Computation]:
    """Computations by name; the one that a program starts with also as "ENTRY"."""
    program = {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = program[header[2]] = Computation()
            if header[1]:
                program["ENTRY"] = computation
        elif start := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            instruction = _instruction(line[start.end() :], start[2], start[1] is not None)
            computation[instruction.name] = instruction
    return program


def _instruction(text: str, name: str, is_root: bool) -> Instruction:
    """What follows `name = `: type opcode(operands), attributes."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    last = _closing("(" + rest) - 1
    arguments, attributes = rest[: last - 1], rest[last:]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(
        name, opcode, _arrays(text[:end]), operands, arguments, attributes, is_root
    )  # fmt: skip


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(text: str) -> tuple[Array, ...]:
    found = re.finditer(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text)
    return tuple(
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), layout or "")
        for dtype, shape, layout in (match.groups() for match in found)
    )


def _bytes_of(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0.0  # a token has none


def numbers(text: str | None) -> list[int]:
    """Those of a list as HLO writes it, "0,2,1"; none of no text."""
    return [int(number) for number in (text or "").split(",") if number]
