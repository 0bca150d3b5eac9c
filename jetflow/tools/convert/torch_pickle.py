"""A machine for the pickles in PyTorch's files, which makes tensors and nothing else.

A pickle is a program for a stack machine, whose opcodes may import and call anything. Python's own
machine also trusts its numbers and its depth: a file of some bytes can ask it for gigabytes, or end
it by a value nested too deep. This one knows the opcodes that a state dict needs, and for it a name
is a key of a table: nothing is imported, only the functions below are called, and of the file's
values only strings and numbers are hashed or compared.
"""

import io
import pickletools
from collections.abc import Callable
from typing import IO, Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jetflow.types import UsageError

DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
REMEDY = "save the model's state_dict() alone"


class Storage(NamedTuple):
    """A run of `count` elements in the file, named by its key."""

    key: str
    dtype: np.dtype
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A view of a storage, unchecked; offset and strides count elements."""

    storage: Any
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


def load(file: io.BufferedIOBase) -> Any:
    """What the next pickle of a file makes: plain values, lists, tuples, dicts and tensors.

    Raises:
        UsageError: if it asks for anything else; the message names it.
        Exception: of many types, if it is damaged.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
        if opcode.name == "STOP":
            break
        machine.execute(opcode.name, argument)
    return machine.stack.pop()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in items:
        _set(made, key, value)
    return made


def _set(target: Any, key: Any, value: Any) -> None:
    if type(target) is not dict or type(key) not in (str, int):
        raise UsageError(
            f"sets an item of a {type(target).__name__} for a {type(key).__name__}; expected a "
            f"dict with names for keys; {REMEDY}"
        )
    target[key] = value


_ADMITTED: dict[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
} | {f"torch {name}": dtype for name, dtype in DTYPES.items()}

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_VALUES = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
           "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
           "BINUNICODE8")  # fmt: skip


class _Machine:
    """The stack with the marks in it, and the memo."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        """One opcode, by its name in `pickletools`."""
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _VALUES:
                push(argument)
            case _ if name in _CONSTANTS:
                push(_CONSTANTS[name]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                pop()
            case "TUPLE":
                push(tuple(self._after_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self._last(int(name[-1]))))
            case "APPEND" | "APPENDS":
                self._extend(self._last(1) if name == "APPEND" else self._after_mark())
            case "SETITEM" | "SETITEMS":
                self._set_items(self._last(2) if name == "SETITEM" else self._after_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL" | "INST":
                push(_admitted(argument))
            case "STACK_GLOBAL":
                push(_admitted(_joined(*self._last(2))))
            case "BINPERSID":
                push(_storage(pop()))
            case "REDUCE":
                push(_call(*self._last(2)))
            case "BUILD":
                _build(*self._last(2))
            case _:
                raise UsageError(f"needs {name}, which no state dict does; {REMEDY}")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("a value is missing")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _after_mark(self) -> list[Any]:
        taken = self.stack[self.marks[-1] :]
        del self.stack[self.marks.pop() :]
        return taken

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UsageError(f"appends to a {type(self.stack[-1]).__name__}; {REMEDY}")
        self.stack[-1].extend(values)

    def _set_items(self, values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            _set(self.stack[-1], key, value)


def _joined(module: Any, name: Any) -> str:
    if type(module) is not str or type(name) is not str:
        raise UsageError(f"asks for an object without a name; refused; {REMEDY}")
    return f"{module} {name}"


def _admitted(name: str) -> Any:
    """What a name ("module name") stands for here."""
    if name not in _ADMITTED:
        raise UsageError(
            f"asks for {name.replace(' ', '.')!r}; refused, nothing was executed: only tensors "
            f"are read; {REMEDY}"
        )
    return _ADMITTED[name]


def _call(function: Any, arguments: Any) -> Any:
    if not callable(function) or type(arguments) is not tuple:
        raise UsageError(f"calls a {type(function).__name__}; refused; {REMEDY}")
    return function(*arguments)


def _build(target: Any, state: Any) -> Any:
    """Further state of a dict, such as a state dict's version numbers, is dropped."""
    del state
    if type(target) is not dict:
        raise UsageError(f"alters a {type(target).__name__}; refused; {REMEDY}")
    return target


def _storage(reference: Any) -> Storage:
    """What ("storage", type, key, device, count) refers to."""
    if type(reference) is tuple and len(reference) >= 5:
        kind, dtype, key, _, count, *view = reference
        plain = type(kind) is str and type(key) is str and type(count) is int
        if plain and kind == "storage" and isinstance(dtype, np.dtype) and view in ([], [None]):
            return Storage(key, dtype, count)
    raise UsageError(f"refers to something that is not the storage of a tensor; {REMEDY}")
