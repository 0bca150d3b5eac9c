"""Batches of small images, a row of numbers each, as CIFAR-10 and the new small ImageNets have."""

import dataclasses
import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jetflow.data.parts import Item


@dataclasses.dataclass(frozen=True)
class RowsPart:
    """Rows [start, stop) of a batch of small images: an .npz with `data` and `labels`, or a pickle.

    Of an .npz the rows are read as they come, a pickle lies in memory as a whole. A row of `data`
    is uint8 [3 · H · W], one colour after another.

    Attributes:
        path, member: the file, or the archive and the file within.
        image_size: H and W.
        first_label: what the first class is called in the file.
        stop: None for all rows that there are.
    """

    path: Path
    member: str
    image_size: int
    first_label: int
    size: int
    start: int = 0
    stop: int | None = None

    @property
    def count(self) -> int:
        return 0 if self.stop is None else self.stop - self.start

    def identity(self) -> tuple:
        return self.member, self.image_size, self.first_label, self.size, self.start, self.stop

    def read(self) -> Iterator[Item]:
        shape = (3, self.image_size, self.image_size)
        with open_member(self.path, self.member) as file:
            rows = self._npz_rows(file) if is_npz(file) else self._pickled_rows(file)
            for number, (row, label) in enumerate(rows, self.start):
                pixels = np.frombuffer(row, np.uint8).reshape(shape).transpose(1, 2, 0)
                yield Item(f"{self.member} row {number}", pixels, int(label) - self.first_label)

    def _npz_rows(self, file: Any) -> Iterator[tuple[bytes, int]]:
        with zipfile.ZipFile(file) as npz:
            with npz.open("labels.npy") as column:
                labels = np.load(column)[self.start : self.stop]
            with npz.open("data.npy") as data:
                _, width = _shape(data)
                data.seek(width * self.start, io.SEEK_CUR)
                for label in labels:
                    yield data.read(width), label

    def _pickled_rows(self, file: Any) -> Iterator[tuple[bytes, int]]:
        batch = _BatchUnpickler(file, encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        rows, labels = (batch[column][self.start : self.stop] for column in ("data", "labels"))
        yield from ((row.tobytes(), label) for row, label in zip(rows, labels, strict=True))


def open_member(path: Path, member: str) -> Any:
    """A binary file, of a zip, of a compressed tar that fits into memory, or of a folder."""
    if path.is_dir():
        return open(path / member, "rb")
    if zipfile.is_zipfile(path):
        return zipfile.ZipFile(path).open(member)
    with tarfile.open(path) as tar:
        file = tar.extractfile(member)
        assert file is not None  # a directory has no rows
        return io.BytesIO(file.read())


def is_npz(file: Any) -> bool:
    """By its first bytes; the position stays at the start."""
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"


def npz_rows(path: Path, member: str) -> int | None:
    """Rows of a batch, or None where it is a pickle."""
    with open_member(path, member) as file:
        if not is_npz(file):
            return None
        with zipfile.ZipFile(file) as npz, npz.open("data.npy") as data:
            return _shape(data)[0]


def _shape(data: Any) -> tuple[int, int]:
    """(rows, bytes a row) by the header of a .npy file, read up to its first row."""
    version = np.lib.format.read_magic(data)
    if version != (1, 0):
        raise zipfile.BadZipFile(f"data.npy has format {version}; expected (1, 0)")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(data)
    if fortran_order or dtype != np.uint8 or len(shape) != 2:
        raise zipfile.BadZipFile(f"data.npy holds {dtype} {shape}; expected rows of uint8")
    return shape


class _BatchUnpickler(pickle.Unpickler):
    """Makes numpy arrays and plain values; anything else in the file is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the batch asks for {module}.{name}, which is no array")
        return _ALLOWED[module.replace("numpy._core", "numpy.core"), name]


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # How protocol 2 writes bytes, and none.
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    ("__builtin__", "bytes"): lambda: b"",
}
