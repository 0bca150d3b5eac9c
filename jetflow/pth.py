"""PyTorch's .pth files, read and written without PyTorch.

Such a file is a pickle with the bytes of the tensors beside it. A pickle is a program for a stack
machine, which may import and call anything. Here Python's machine knows the opcodes of a state dict
alone, a name is the key of a table, and nothing is imported. It is the one written in Python, which
keeps its memo in a dict: the one written in C takes gigabytes where a file asks for it.
"""

import dataclasses
import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jetflow.buckets import as_path
from jetflow.files import write_atomically
from jetflow.types import UsageError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_PICKLE = 2**20  # bytes, of 8,000 tensors; the machine takes up to 200 times as many
ROOM = 2**28  # bytes by which all tensors together may exceed the file, where they share elements
SHOWN = 80  # letters of a name in a message
REMEDY = "save the model's state_dict() alone"

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
_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT",
    "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
    "BINPERSID", "REDUCE",
)  # fmt: skip

Storage = Callable[[str, np.dtype, int], np.ndarray]  # of a key, a type and a number of elements


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    """What a pickle says of a tensor, unchecked: a part of a storage, counted in elements."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def view(self) -> np.ndarray:
        """The elements, where they lie in the storage; numpy refuses what lies outside."""
        numbers = (self.offset, *self.shape, *self.strides)
        has_sizes = all(type(n) is int and n >= 0 for n in numbers)
        if type(self.storage) is not np.ndarray or not has_sizes:
            raise _damaged("a tensor has no storage or no shape")
        size = self.storage.itemsize
        steps = [size * stride for stride in self.strides]
        return np.ndarray(self.shape, self.storage.dtype, self.storage, self.offset * size, steps)


def _damaged(what: str) -> UsageError:
    return UsageError(f"is damaged: {what[: 2 * SHOWN]}; copy or download it again")


def read_pth(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, in the file's order and types, in the zip or the legacy format.

    Raises:
        UsageError: if the file cannot be read, asks for an object other than a tensor (the message
            names it; nothing of it is executed), or holds anything but a dict of tensors.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("it is no file")  # a device may have no end
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            tensors = (_read_zip if zipfile.is_zipfile(file) else _read_legacy)(file, size)
        return _copies(tensors, size + ROOM)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); expected a .pth file") from error
    except UsageError as error:
        raise UsageError(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle raises many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UsageError(
            f"{path} is no readable PyTorch file ({reason!a}); expected a state dict as torch.save "
            "writes it"
        ) from error


def _read_zip(file: io.BufferedReader, size: int) -> dict[str, _Tensor]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise UsageError("is a compressed zip file; unzip it, and zip it again by `zip -0 -r`")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UsageError("is a zip file without a data.pkl; expected what torch.save writes")
        if entries[pickles[0]].file_size > LARGEST_PICKLE:
            raise UsageError(f"has a data.pkl of more than {LARGEST_PICKLE:,} bytes; {REMEDY}")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            entry = entries.get(f"{root}data/{key}")
            if entry is None or entry.file_size != count * dtype.itemsize:
                raise _damaged(f"storage {key!r} is missing or of another size")
            values = np.frombuffer(archive.read(entry), dtype, count)
            return values if _order(order.decode()) == sys.byteorder else values.byteswap()

        content = io.BytesIO(archive.read(pickles[0]))
        return _state_dict(_Unpickler(content, storage, size).load())


def _read_legacy(file: io.BufferedReader, size: int) -> dict[str, _Tensor]:
    """Pickles of a magic number, a version, the system, the state dict and its storages' keys."""
    arrays: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        arrays[key] = np.empty(count, dtype)  # their contents follow the pickles
        return arrays[key]

    file.seek(0)
    pickles = io.BytesIO(file.read(LARGEST_PICKLE))
    unpickler = _Unpickler(pickles, storage, size)
    if unpickler.load() != LEGACY_MAGIC:
        raise UsageError("is no PyTorch file; expected what torch.save writes")
    _, system, state, keys = (unpickler.load() for _ in range(4))
    order = _order("little" if system["little_endian"] else "big")
    tensors = _state_dict(state)
    file.seek(pickles.tell())
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        if type(key) is not str or key not in arrays or count != len(arrays[key]):
            raise _damaged(f"a storage has {count} elements")
        dtype = arrays[key].dtype
        values = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
        arrays[key][:] = values if order == sys.byteorder else values.byteswap()
    return tensors


def _order(name: str) -> str:
    if name not in ("little", "big"):
        raise _damaged(f"its byte order is {name!r}")
    return name


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """A pickle's content, if it is a dict of tensors."""
    if type(content) is not dict:
        raise UsageError(f"holds one {type(content).__name__}; expected a dict of tensors")
    for key, value in content.items():
        if type(key) is not str or type(value) is not _Tensor:
            name = f"{key!r}"[:SHOWN]
            raise UsageError(f"holds {name}, a {type(value).__name__} and no tensor; {REMEDY}")
    return content


def _copies(tensors: Mapping[str, _Tensor], allowed: int) -> dict[str, np.ndarray]:
    """Contiguous copies, unless views that repeat elements would take more bytes than allowed."""
    copies = {}
    for name, tensor in tensors.items():
        view = tensor.view()
        allowed -= view.nbytes
        if allowed < 0:
            raise UsageError(
                "makes tensors far larger than itself by repeating elements; save contiguous copies"
            )
        copies[name] = view.copy()
    return copies


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Makes plain values, lists, tuples, dicts and tensors; only texts and numbers are hashed."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code]  # type: ignore[attr-defined]
        for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }  # any other is a KeyError

    stack: list[Any]

    def __init__(self, file: Any, storage: Storage, size: int):
        super().__init__(file)
        self._storage, self._left = storage, size
        self._storages: dict[str, np.ndarray] = {}

    def load(self) -> Any:
        """The next pickle of the file."""
        self.memo = {}
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in _FUNCTIONS:
            name = f"{module}.{name}"[:SHOWN]
            raise UsageError(
                f"asks for {name!r}; refused, nothing was executed: only tensors are read; {REMEDY}"
            )
        return _FUNCTIONS[module, name]

    def persistent_load(self, reference: Any) -> np.ndarray:
        """The storage of ("storage", type, key, device, count)."""
        match reference:
            case ("storage", np.dtype() as dtype, str(key), _, int(count), *rest) if not any(rest):
                pass
            case _:
                raise UsageError(
                    f"refers to something that is not the storage of a tensor; {REMEDY}"
                )
        if key not in self._storages:
            self._left -= max(0, count) * dtype.itemsize
            if count < 0 or self._left < 0:
                raise _damaged(f"storage {key!r} is cut short")
            self._storages[key] = self._storage(key, dtype, count)
        array = self._storages[key]
        if (array.dtype, len(array)) != (dtype, count):
            raise _damaged(f"storage {key!r} has two descriptions")
        return array

    def load_setitems(self) -> None:
        self._set(self.pop_mark())  # type: ignore[attr-defined]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_build(self) -> None:
        """Drop further state of a dict, such as a state dict's version numbers."""
        self.stack.pop()
        self._set([])

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or not all(type(key) in (str, int) for key in items[::2]):
            raise UsageError(
                f"alters a {type(target).__name__}; expected a dict with names for keys; {REMEDY}"
            )
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.BUILD[0]] = load_build


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


_FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


def write_pth(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a state dict that `torch.load` reads; the same tensors give the same bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    parts = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for key, (name, array) in enumerate(tensors.items()):
        parts += [_dumps(name), _tensor(str(key), array, names[array.dtype])]
    files = {"data.pkl": b"".join([*parts, b"u."]), "byteorder": sys.byteorder.encode()}
    with write_atomically(as_path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for member, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{member}"), content)
        for key, array in enumerate(tensors.values()):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), array.tobytes())
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _tensor(key: str, array: np.ndarray, kind: str) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    storage = [b"(", _dumps("storage"), f"ctorch\n{kind}\n".encode(), _dumps(key), _dumps("cpu"),
               _dumps(array.size), b"tQ"]  # fmt: skip
    arguments = [*storage, *map(_dumps, (0, array.shape, strides, False))]
    return b"".join([b"ctorch._utils\n_rebuild_tensor_v2\n(", *arguments,
                     b"ccollections\nOrderedDict\n)RtR"])  # fmt: skip


def _dumps(value: str | int | tuple[int, ...]) -> bytes:
    """A plain value in pickle's protocol 2, without its first and last opcodes."""
    return pickle.dumps(value, protocol=2)[2:-1]
