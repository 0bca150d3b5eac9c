"""big_vision's checkpoints: an .npz of parameters, or a folder of one zarr array for each."""

import os
import zipfile
from pathlib import Path

import numpy as np

from jetflow.types import UsageError

PREFIX = "params/"
POINTER = "-LAST"  # CHECKPOINT-LAST holds the suffix of the newest folder CHECKPOINT-SUFFIX
COMPLETE = {"fill_missing_data_reads": False}  # a chunk that is not there is damage, no zeros
EXPECTED = (
    "expected an .npz, a checkpoint.bv-… folder, or a workdir with the pointer checkpoint.bv-LAST"
)


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
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())[:240]
        raise UsageError(f"{path} cannot be read ({reason}); {EXPECTED}") from error
    if not tensors:
        raise UsageError(f"{path} holds no parameters; {EXPECTED}")
    return tensors


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UsageError(f"{path} holds one array; {EXPECTED}")
        prefix = PREFIX if any(name.startswith(PREFIX) for name in file.files) else ""
        names = [name for name in file.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): file[name] for name in names}


def _newest(path: Path) -> Path:
    """The folder of arrays that a path means."""
    pointers = [path.with_name(path.name + POINTER)]
    if path.is_dir():
        if any(path.glob("*/.zarray")):
            return path
        pointers = sorted(path.glob("*" + POINTER))
    if len(pointers) != 1 or not pointers[0].is_file():
        raise UsageError(f"{path} is no checkpoint of big_vision; {EXPECTED}")
    stem = pointers[0].name.removesuffix(POINTER)
    folder = pointers[0].with_name(f"{stem}-{pointers[0].read_text().strip()}")
    if not folder.is_dir():
        raise UsageError(f"{pointers[0]} points to {folder}, which is not there; {EXPECTED}")
    return folder


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    import tensorstore

    opened = {}
    for array in sorted(folder.glob(PREFIX.replace("/", "~") + "*")):
        kvstore = {"driver": "file", "path": f"{array.resolve()}/"}
        opened[array.name.replace("~", "/").removeprefix(PREFIX)] = tensorstore.open(
            {"driver": "zarr", "kvstore": kvstore, **COMPLETE}, open=True, read=True
        )
    return {name: np.asarray(array.result().read().result()) for name, array in opened.items()}
