"""PyTorch's .pth files, read and written without PyTorch.

Such a file is a pickle, which may ask for any object of any module, and the bytes of the tensors.
Here it can have tensors and nothing else: opcodes that no state dict needs are refused before
anything is unpickled, and a name stands for what this module makes of it. Sizes that the file
claims are held against its own size before memory is taken.
"""

import io
import math
import os
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jetflow.files import write_atomically
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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STATE_DICT_OPCODES = (
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE "
    "EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS "
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINPUT LONG_BINPUT BINGET "
    "LONG_BINGET MEMOIZE"
)
MOST_TUPLES = 30_000  # four a tensor; some 300,000, nested, end Python without a word
ROOM = 2**28  # bytes by which all tensors together may exceed the file, where they share storages
REMEDY = "save the model's state_dict() alone"
COPY_AGAIN = "copy or download it again"


class Storage(NamedTuple):
    """A run of `count` elements in the file, named by its key."""

    key: str
    dtype: np.dtype
    count: int


class StoredTensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pth(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, in the file's order and types, in the zip or the legacy format.

    Raises:
        UsageError: if the file cannot be read, asks for an object other than a tensor (the message
            names it; nothing of it is executed), or holds anything but a dict of tensors.
    """
    try:
        with open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)
        return (_read_zip if is_zip else _read_legacy)(Path(path))
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


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UsageError(
                "is a compressed zip file, but PyTorch writes uncompressed ones; unzip it, and "
                "zip the folder again with `zip -0 -r`"
            )
        names = set(archive.namelist())
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UsageError("is a zip file without a data.pkl; expected what torch.save writes")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        tensors = _state_dict(_unpickle(io.BytesIO(archive.read(pickles[0]))))

        def content(storage: Storage) -> bytes:
            member = f"{root}data/{storage.key}"
            if member not in names:
                raise UsageError(f"is damaged: it has no storage {member!r}; {COPY_AGAIN}")
            return archive.read(member)

        return _materialise(tensors, content, order.decode("ascii", "replace"), path)


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Pickles of a magic number, a version, the system, the state dict and its storages' keys."""
    file = io.BytesIO(path.read_bytes())
    if _unpickle(file) != LEGACY_MAGIC:
        raise UsageError("does not start with PyTorch's magic number; expected a .pth file")
    _unpickle(file)
    order = "little" if _unpickle(file)["little_endian"] else "big"
    tensors = _state_dict(_unpickle(file))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    contents = {}
    for key in _unpickle(file):
        count = int.from_bytes(file.read(8), "little", signed=True)
        if type(key) is not str or key not in storages or count != storages[key].count:
            raise UsageError(f"is damaged: a storage has {count} elements; {COPY_AGAIN}")
        contents[key] = file.read(max(count, 0) * storages[key].dtype.itemsize)
    return _materialise(tensors, lambda storage: contents[storage.key], order, path)


class _Dict(dict):
    """An OrderedDict of the file; its attributes, a module's version numbers say, are dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Rebuild:
    """What a file calls to make a tensor; without attributes that it could alter."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any):
        numbers = (offset, *shape[:64], *strides[:64])
        if type(storage) is not Storage or len(shape) != len(strides) or len(shape) > 32:
            raise UsageError(f"is damaged: a tensor has no proper storage or shape; {COPY_AGAIN}")
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise UsageError(f"is damaged: a tensor has no proper shape; {COPY_AGAIN}")
        return StoredTensor(storage, offset, tuple(shape), tuple(strides))


class _Parameter:
    """What makes a parameter of a tensor; here it is the tensor."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    """Tensors and plain values; any other name is refused, and nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        admitted: dict[str, Any] = {
            "collections.OrderedDict": _Dict,
            "torch._utils._rebuild_tensor": _Rebuild(),
            "torch._utils._rebuild_tensor_v2": _Rebuild(),
            "torch._utils._rebuild_parameter": _Parameter(),
        } | {f"torch.{storage}": storage for storage in DTYPES}
        if f"{module}.{name}" not in admitted:
            raise UsageError(
                f"asks for {module + '.' + name!r}; refused, nothing was executed: only tensors "
                f"are read; {REMEDY}"
            )
        return admitted[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", str(kind), str(key), _, int(count), *rest) if kind in DTYPES:
                if not any(rest) and count >= 0:
                    return Storage(key, DTYPES[kind], count)
        raise UsageError(f"refers to something that is not the storage of a tensor; {REMEDY}")


def _unpickle(file: io.BytesIO) -> Any:
    """The next pickle of a file: plain values, lists, tuples, dicts and tensors."""
    start, tuples, known = file.tell(), 0, set(_STATE_DICT_OPCODES.split())
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name not in known:
            raise UsageError(f"needs {opcode.name}, which no state dict does; {REMEDY}")
        tuples += opcode.name.startswith("TUPLE")
        far = opcode.name.endswith("BINPUT") and argument > number
        if far or tuples > MOST_TUPLES:
            raise UsageError(f"holds far more than tensors; {REMEDY}")
    end = file.tell()
    return _Unpickler(io.BytesIO(file.getbuffer()[start:end])).load()


def _state_dict(content: Any) -> dict[str, StoredTensor]:
    """A pickle's content, if it is a dict of tensors."""
    if not isinstance(content, dict):
        raise UsageError(f"holds one {type(content).__name__}; expected a dict of tensors")
    wrong = [
        f"{key!a:.80} ({type(value).__name__})"
        for key, value in content.items()
        if type(key) is not str or type(value) is not StoredTensor
    ]
    if wrong:
        raise UsageError(f"holds more than tensors: {', '.join(wrong[:4])}; {REMEDY}")
    return content


def _materialise(
    tensors: Mapping[str, StoredTensor],
    content: Callable[[Storage], bytes],
    order: str,
    path: Path,
) -> dict[str, np.ndarray]:
    """Copies of the tensors; each storage is read once, whatever shares it.

    Args:
        content: the bytes of a storage.
        order: of the bytes of a number, "little" or "big".
        path: the file, whose size bounds what its tensors may take.
    """
    if order not in ("little", "big"):
        raise UsageError(f"has the byte order {order!r}; expected little or big; {COPY_AGAIN}")
    storages: dict[str, tuple[Storage, np.ndarray]] = {}
    arrays: dict[str, np.ndarray] = {}
    left = path.stat().st_size + ROOM
    for name, (storage, offset, shape, strides) in tensors.items():
        if storage.key not in storages:
            raw = content(storage)
            if len(raw) < storage.count * storage.dtype.itemsize:
                raise UsageError(f"is damaged: the storage of {name!r} is cut short; {COPY_AGAIN}")
            values = np.frombuffer(raw, storage.dtype, storage.count)
            storages[storage.key] = storage, values
        described, values = storages[storage.key]
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if described != storage or (math.prod(shape) and last >= len(values)):
            raise UsageError(f"is damaged: {name!r} does not fit its storage; {COPY_AGAIN}")
        left -= math.prod(shape) * values.itemsize
        if left < 0:
            raise UsageError(
                f"makes tensors far larger than itself, up to {name!r}, by repeating elements; "
                "save contiguous copies of them"
            )
        if not math.prod(shape):
            arrays[name] = np.empty(shape, values.dtype)
            continue
        steps = [stride * values.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values[offset:], shape, steps)
        arrays[name] = view.copy() if order == sys.byteorder else view.byteswap()
    return arrays


_MARK, _TUPLE, _CALL = b"(", b"t", b"R"
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write_pth(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a state dict that `torch.load` reads; the same tensors give the same bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    parts = [b"\x80\x02", _ORDERED_DICT, _MARK]
    for key, (name, array) in enumerate(tensors.items()):
        parts += [_opcodes(name), _tensor_opcodes(str(key), array, names[array.dtype])]
    parts += [b"u."]  # SETITEMS, STOP
    members = {"data.pkl": b"".join(parts), "byteorder": sys.byteorder.encode()}
    members |= {f"data/{key}": array.tobytes() for key, array in enumerate(tensors.values())}
    with (
        write_atomically(Path(path)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, content in (members | {"version": b"3\n"}).items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)


def _tensor_opcodes(key: str, array: np.ndarray, storage: str) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    reference = [_MARK, _opcodes("storage"), f"ctorch\n{storage}\n".encode(), _opcodes(key),
                 _opcodes("cpu"), _opcodes(array.size), _TUPLE, b"Q"]  # fmt: skip
    arguments = [_MARK, *reference, _opcodes(0), _opcodes(array.shape), _opcodes(strides),
                 _opcodes(False), _ORDERED_DICT, _TUPLE]  # fmt: skip
    return b"".join([b"ctorch._utils\n_rebuild_tensor_v2\n", *arguments, _CALL])


def _opcodes(value: str | int | tuple[int, ...]) -> bytes:
    """A plain value in pickle's protocol 2, without the protocol's frame."""
    return pickle.dumps(value, protocol=2)[2:-1]
