"""PyTorch's .pth files, read without PyTorch.

Such a file is a pickle, which may ask for any object of any module, plus the bytes of the tensors.
Here it can ask for tensors and nothing else: every other name is refused before it is looked up.
"""

import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_EXPANDED = 2**28  # bytes of a tensor that repeats the elements of its storage


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


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, in the file's order and types, in either of the two formats.

    Raises:
        UsageError: if the file cannot be read, asks for an object other than a tensor (the message
            names it; nothing of it is executed), or holds anything but a dict of tensors.
    """
    try:
        with open(path, "rb") as file:
            reader = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            return reader(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); expected a .pth file") from error
    except UsageError as error:
        raise UsageError(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle raises many types
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"{path} is no readable PyTorch file ({reason}); expected a state dict as torch.save "
            "writes it"
        ) from error


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UsageError("is a compressed zip file; PyTorch writes uncompressed ones")
        names = set(archive.namelist())
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UsageError("is a zip file but no state dict: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        tensors = _state_dict(_Unpickler(io.BytesIO(archive.read(pickles[0]))).load())

        def content(storage: Storage) -> bytes:
            return archive.read(f"{root}data/{storage.key}")

        return _materialise(tensors, content, order.decode())


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """Pickles of a magic number, a version, the system, the state dict and its storages' keys."""
    if _Unpickler(file).load() != LEGACY_MAGIC:
        raise UsageError("is no PyTorch file: it does not start with PyTorch's magic number")
    _Unpickler(file).load()
    system = _Unpickler(file).load()
    tensors = _state_dict(_Unpickler(file).load())
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    contents = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little", signed=True)
        if key not in storages or count != storages[key].count:
            raise UsageError(f"is damaged: storage {key} has {count} elements")
        contents[key] = file.read(count * storages[key].dtype.itemsize)
    order = "little" if system["little_endian"] else "big"
    return _materialise(tensors, lambda storage: contents[storage.key], order)


class _Refused(UsageError):
    pass


class _Callable:
    """What a pickle may call, and can do nothing else with: not even set an attribute of it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setattr__(self, name, value):
        raise _Refused("is refused: it alters PyTorch's own functions")


class _Dict(dict):
    """A dict whose further state, such as a state dict's version numbers, is dropped."""

    def __setstate__(self, state):
        pass


def _rebuild_tensor(storage, offset, shape, strides, *_) -> StoredTensor:
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


_ADMITTED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _Callable(_Dict),
    ("torch._utils", "_rebuild_tensor"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(lambda tensor, *_: tensor),
}


class _Unpickler(pickle.Unpickler):
    """Admits tensors, plain values and dicts; of any other object it raises with the name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and name in DTYPES:
            return name
        raise _Refused(
            f"asks for {module}.{name}; refused, nothing was executed: only tensors are read. "
            "Save the model's state_dict() alone"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in DTYPES or type(count) is not int or any(view):
            raise _Refused(f"refers to {pid!r}; expected the storage of a tensor")
        return Storage(str(key), DTYPES[dtype], count)


def _state_dict(content: Any) -> dict[str, StoredTensor]:
    if not isinstance(content, dict):
        raise UsageError(f"holds one {type(content).__name__}; expected a dict of tensors")
    wrong = [
        f"{key!r} ({type(value).__name__})"
        for key, value in dict.items(content)
        if not isinstance(key, str) or not isinstance(value, StoredTensor)
    ]
    if wrong:
        raise UsageError(
            f"holds more than tensors: {', '.join(wrong)}; save the model's state_dict() alone"
        )
    return dict(content)


def _materialise(
    tensors: Mapping[str, StoredTensor], content: Callable[[Storage], bytes], order: str
) -> dict[str, np.ndarray]:
    """Copies of the tensors; each storage is read once, whatever shares it."""
    storages: dict[str, np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if not isinstance(storage, Storage):
            raise UsageError(f"is damaged: {name} has no storage")
        if storage.key not in storages:
            raw = content(storage)
            if len(raw) < storage.count * storage.dtype.itemsize:
                raise UsageError(f"is damaged: the storage of {name} is cut short")
            values = np.frombuffer(raw, storage.dtype, storage.count)
            storages[storage.key] = values if order == sys.byteorder else values.byteswap()
        values = storages[storage.key]
        if values.dtype != storage.dtype or len(values) != storage.count:
            raise UsageError(f"is damaged: the storage of {name} is described in two ways")
        arrays[name] = _view(name, tensor, values).copy()
    return arrays


def _view(name: str, tensor: StoredTensor, values: np.ndarray) -> np.ndarray:
    """The part of a storage that a tensor is; raises where it would reach out of it."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or not all(type(n) is int for n in numbers):
        raise UsageError(f"is damaged: the shape of {name} is {tensor.shape}")
    size = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if min(numbers) < 0 or (size and last >= len(values)):
        raise UsageError(f"is damaged: {name} reaches out of its storage")
    if size > len(values) and size * values.itemsize > LARGEST_EXPANDED:
        raise UsageError(f"is damaged: {name} repeats few elements to a size of {size}")
    if not size:
        return np.empty(tensor.shape, values.dtype)
    strides = [stride * values.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides)
