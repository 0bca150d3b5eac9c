"""State dicts as `torch.load` reads them, written without PyTorch."""

import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jetflow.files import write_atomically
from jetflow.tools.convert.torch_pickle import DTYPES

_MARK, _TUPLE, _CALL = b"(", b"t", b"R"
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load` reads; the same tensors give the same bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    parts = [b"\x80\x02", _ORDERED_DICT, _MARK]
    for key, (name, array) in enumerate(tensors.items()):
        parts += [_opcodes(name), _tensor_opcodes(str(key), array, names[array.dtype])]
    parts += [b"u."]  # SETITEMS, STOP
    with (
        write_atomically(Path(path)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):

        def add(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)

        add("data.pkl", b"".join(parts))
        add("byteorder", sys.byteorder.encode())
        for key, array in enumerate(tensors.values()):
            add(f"data/{key}", array.tobytes())
        add("version", b"3\n")


def _tensor_opcodes(key: str, array: np.ndarray, storage: str) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    strides, step = [], 1
    for length in reversed(array.shape):
        strides.insert(0, step)
        step *= length
    reference = [_MARK, _opcodes("storage"), f"ctorch\n{storage}\n".encode(), _opcodes(key),
                 _opcodes("cpu"), _opcodes(array.size), _TUPLE, b"Q"]  # fmt: skip
    arguments = [_MARK, *reference, _opcodes(0), _opcodes(array.shape), _opcodes(tuple(strides)),
                 _opcodes(False), _ORDERED_DICT, _TUPLE]  # fmt: skip
    return b"".join([b"ctorch._utils\n_rebuild_tensor_v2\n", *arguments, _CALL])


def _opcodes(value: str | int | tuple[int, ...]) -> bytes:
    """A plain value in pickle's protocol 2, without the protocol's frame."""
    return pickle.dumps(value, protocol=2)[2:-1]
