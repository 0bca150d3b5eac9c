"""PyTorch's .pth files, read without PyTorch.

Such a file is a pickle, which may ask for any object of any module, plus the bytes of the tensors.
Here it can ask for tensors and nothing else, see `torch_pickle`.
"""

import io
import math
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jetflow.tools.convert import torch_pickle
from jetflow.tools.convert.torch_pickle import REMEDY, Storage, StoredTensor
from jetflow.types import UsageError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ROOM = 2**28  # bytes by which all tensors together may exceed the file, where they share storages
COPY_AGAIN = "copy or download it again"


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
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UsageError(
            f"{path} is no readable PyTorch file ({reason!a}); expected a state dict as torch.save "
            "writes it"
        ) from error


def _read_zip(file: io.BufferedReader) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UsageError(
                "is a compressed zip file, but PyTorch writes uncompressed ones; unzip it, and "
                "zip the folder again with `zip -0 -r`"
            )
        names = set(archive.namelist())
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UsageError(
                "is a zip file, but no state dict: it has no data.pkl; expected what torch.save "
                "writes"
            )
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        tensors = _state_dict(torch_pickle.load(io.BytesIO(archive.read(pickles[0]))))

        def content(storage: Storage) -> bytes:
            member = f"{root}data/{storage.key}"
            if member not in names:
                raise UsageError(f"is damaged: it has no storage {member!r}; {COPY_AGAIN}")
            return archive.read(member)

        return _materialise(tensors, content, order.decode("ascii", "replace"), _size(file))


def _read_legacy(file: io.BufferedReader) -> dict[str, np.ndarray]:
    """Pickles of a magic number, a version, the system, the state dict and its storages' keys."""
    if torch_pickle.load(file) != LEGACY_MAGIC:
        raise UsageError(
            "is no PyTorch file: it does not start with PyTorch's magic number; expected what "
            "torch.save writes"
        )
    torch_pickle.load(file)
    system = torch_pickle.load(file)
    tensors = _state_dict(torch_pickle.load(file))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    size, contents = _size(file), {}
    for key in torch_pickle.load(file):
        count = int.from_bytes(file.read(8), "little", signed=True)
        if type(key) is not str or key not in storages or count != storages[key].count:
            raise UsageError(f"is damaged: a storage has {count} elements; {COPY_AGAIN}")
        contents[key] = file.read(min(storages[key].size, size))
    order = "little" if system["little_endian"] else "big"
    return _materialise(tensors, lambda storage: contents[storage.key], order, size)


def _size(file: io.BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _state_dict(content: Any) -> dict[str, StoredTensor]:
    """A pickle's content, if it is a dict of tensors that have storages."""
    if type(content) is not dict:
        raise UsageError(f"holds one {type(content).__name__}; expected a dict of tensors")
    wrong = [
        f"{key!r} ({type(value).__name__})"
        for key, value in content.items()
        if type(key) is not str or type(value) is not StoredTensor
    ]
    if wrong:
        raise UsageError(f"holds more than tensors: {', '.join(wrong)}; {REMEDY}")
    for name, tensor in content.items():
        if type(tensor.storage) is not Storage:
            raise UsageError(f"is damaged: {name!r} has no storage; {COPY_AGAIN}")
    return content


def _materialise(
    tensors: Mapping[str, StoredTensor],
    content: Callable[[Storage], bytes],
    order: str,
    size: int,
) -> dict[str, np.ndarray]:
    """Copies of the tensors; each storage is read once, whatever shares it.

    Args:
        content: the bytes of a storage.
        order: of the bytes of a number, "little" or "big".
        size: of the file, in bytes.
    """
    if order not in ("little", "big"):
        raise UsageError(f"has the byte order {order!r}; expected little or big; {COPY_AGAIN}")
    storages: dict[str, tuple[Storage, np.ndarray]] = {}
    arrays: dict[str, np.ndarray] = {}
    left = size + ROOM
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.key not in storages:
            storages[storage.key] = storage, _values(name, storage, content(storage), order)
        described, values = storages[storage.key]
        if described != storage:
            raise UsageError(
                f"is damaged: the storage of {name!r} is described in two ways; {COPY_AGAIN}"
            )
        view = _view(name, tensor, values)
        left -= view.nbytes
        if left < 0:
            raise UsageError(
                f"makes tensors far larger than itself, up to {name!r}, by repeating elements; "
                "save contiguous copies of them"
            )
        arrays[name] = view.copy()
    return arrays


def _values(name: str, storage: Storage, raw: bytes, order: str) -> np.ndarray:
    """The elements of a storage, in this machine's byte order."""
    if not 0 <= storage.size <= len(raw):
        raise UsageError(f"is damaged: the storage of {name!r} is cut short; {COPY_AGAIN}")
    values = np.frombuffer(raw, storage.dtype, storage.count)
    return values if order == sys.byteorder else values.byteswap()


def _view(name: str, tensor: StoredTensor, values: np.ndarray) -> np.ndarray:
    """The part of a storage that a tensor is; raises where it would reach out of it."""
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and abs(n) < 2**62 for n in numbers) or len(shape) > 32:
        raise UsageError(f"is damaged: {name!r} has no proper shape; {COPY_AGAIN}")
    if len(shape) != len(strides):
        raise UsageError(f"is damaged: the shape of {name!r} is {shape}; {COPY_AGAIN}")
    size = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(numbers) < 0 or (size and last >= len(values)):
        raise UsageError(f"is damaged: {name!r} reaches out of its storage; {COPY_AGAIN}")
    if not size:
        return np.empty(shape, values.dtype)
    steps = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps)
