"""big_vision's checkpoints: an .npz of parameters, or a folder of one zarr array for each."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from jetflow.npz import ROOM, Npz
from jetflow.types import UsageError

PREFIX = "params/"
POINTER = "-LAST"  # CHECKPOINT-LAST holds the suffix of the newest folder CHECKPOINT-SUFFIX
COMPLETE = {"fill_missing_data_reads": False}  # a chunk that is not there is damage, no zeros
EXPECTED = "an .npz, a checkpoint.bv-… folder, or a workdir with the pointer checkpoint.bv-LAST"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The parameters by name, as "couplings/dnn/init_proj/kernel"; all else is left out.

    Args:
        path: an .npz with or without the prefix `params/`; a `checkpoint.bv-STEP` folder; that
            name without `-STEP`, or the workdir, where the `-LAST` pointer says which one.

    Raises:
        UsageError: if there is no such checkpoint, or it cannot be read.
    """
    path = Path(path)
    try:
        tensors = _read_npz(path) if path.is_file() else _read_folder(_newest(path))
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UsageError(f"{path} cannot be read ({reason}); expected {EXPECTED}") from error
    if not tensors:
        raise UsageError(f"{path} holds no parameters; expected {EXPECTED}")
    return tensors


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    file = Npz(path, "the checkpoint", EXPECTED)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in file.names) else ""
    names = [name for name in file.names if name.startswith(prefix)]
    return {name.removeprefix(prefix): file.array(name) for name in names}


def _newest(path: Path) -> Path:
    """The folder of arrays that a path means."""
    pointers = [path.with_name(path.name + POINTER)]
    if path.is_dir():
        if any(path.glob("*/.zarray")):
            return path
        pointers = sorted(path.glob("*" + POINTER))
    if len(pointers) != 1 or not pointers[0].is_file():
        raise UsageError(f"{path} is no checkpoint of big_vision; expected {EXPECTED}")
    stem = pointers[0].name.removesuffix(POINTER)
    folder = pointers[0].with_name(f"{stem}-{pointers[0].read_text().strip()}")
    if not folder.is_dir():
        raise UsageError(
            f"{pointers[0]} points to {folder}, which is not there; expected {EXPECTED}"
        )
    return folder


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    import tensorstore

    opened = {}
    for array in sorted(folder.glob(PREFIX.replace("/", "~") + "*")):
        kvstore = {"driver": "file", "path": f"{array.resolve()}/"}
        opened[array.name.replace("~", "/").removeprefix(PREFIX)] = tensorstore.open(
            {"driver": "zarr", "kvstore": kvstore, **COMPLETE}, open=True, read=True
        )
    arrays = {name: array.result() for name, array in opened.items()}
    stored = sum(file.stat().st_size for file in folder.glob("*/*"))
    if sum(map(_bytes, arrays.values())) > stored + ROOM:
        raise ValueError("its arrays are far larger than their files")
    return {name: np.asarray(array.read().result()) for name, array in arrays.items()}


def _bytes(array: Any) -> int:
    """What an array takes in memory, or a single chunk of it, where that is more."""
    chunk = array.chunk_layout.read_chunk.shape
    return array.dtype.numpy_dtype.itemsize * max(math.prod(array.shape), math.prod(chunk))
