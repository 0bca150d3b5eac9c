"""Parts of archives: runs of images that one process reads by itself, without unpacking them.

A part is small and can be sent to another process; `read` gives its images one after another, so
that memory does not grow with the archive. What is damaged comes as an item too, with the reason.
"""

import dataclasses
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jetflow.data.images import Unreadable
from jetflow.types import NO_LABEL

# What a damaged archive raises as a whole; a damaged image in it is an `Unreadable` item.
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, pickle.UnpicklingError)


class Item(NamedTuple):
    """One image of an archive.

    Attributes:
        name: where it lies, for people: "n01440764.tar/n01440764_10026.JPEG".
        content: an image file, or pixels, uint8 [H, W, 3], or why there is neither.
        label: the number of its class, or `NO_LABEL`.
    """

    name: str
    content: bytes | np.ndarray | Unreadable
    label: int


@runtime_checkable
class Part(Protocol):
    """A run of an archive's images.

    Attributes:
        size: bytes of the archive in it.
        count: images in it; 0 where that is not known before it is read.
    """

    @property
    def size(self) -> int: ...

    @property
    def count(self) -> int: ...

    def identity(self) -> tuple:
        """What fixes the images, but for the folder that holds the archive."""
        ...

    def read(self) -> Iterator[Item]: ...


@dataclasses.dataclass(frozen=True)
class TarPart:
    """The members of a tar file whose headers lie in the bytes [offset, offset + size).

    That may be a tar within a tar.

    Attributes:
        labels: of each file in turn, or one of all of them.
        shift: how much farther behind the bytes lie in `path`, if that is a copy of some of them.
    """

    path: Path
    name: str
    offset: int
    size: int
    labels: tuple[int, ...] | int = NO_LABEL
    count: int = 0
    shift: int = 0

    def identity(self) -> tuple:
        return self.name, self.offset, self.size, self.labels

    def read(self) -> Iterator[Item]:
        number = 0
        try:
            for member, file in _members(self.path, self.offset + self.shift, self.size):
                label = self.labels if isinstance(self.labels, int) else self.labels[number]
                number += 1
                yield Item(f"{self.name}/{member.name}", file.read(), label)
        except DAMAGE as error:
            reason = Unreadable(f"the tar is damaged behind its file number {number}: {error}")
            yield Item(self.name, reason, NO_LABEL)


def _members(path: Path, offset: int, size: int) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    with open(path, "rb") as file:
        file.seek(offset)
        if not size:
            raise tarfile.ReadError("it is empty")
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) and member.offset < offset + size:
                if (content := tar.extractfile(member)) is not None:
                    yield member, content


@dataclasses.dataclass(frozen=True)
class ZipPart:
    """Some members of a zip file."""

    path: Path
    members: tuple[str, ...]
    labels: tuple[int, ...]
    size: int

    @property
    def count(self) -> int:
        return len(self.members)

    def identity(self) -> tuple:
        return self.path.name, self.members, self.labels, self.size

    def read(self) -> Iterator[Item]:
        with zipfile.ZipFile(self.path) as archive:
            for member, label in zip(self.members, self.labels, strict=True):
                try:
                    content = archive.read(member)
                except DAMAGE as error:
                    content = Unreadable(f"damaged in the zip: {error}")
                yield Item(member, content, label)


@dataclasses.dataclass(frozen=True)
class FilePart:
    """Some files below a folder."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    size: int

    @property
    def count(self) -> int:
        return len(self.files)

    def identity(self) -> tuple:
        return self.files, self.labels, self.size

    def read(self) -> Iterator[Item]:
        for name, label in zip(self.files, self.labels, strict=True):
            try:
                content = (self.root / name).read_bytes()
            except OSError as error:
                content = Unreadable(str(error.strerror))
            yield Item(name, content, label)


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


def flat_tar(
    path: Path, most_bytes: int, most_count: int, label_of: Callable[[str], int] | None = None
) -> Iterator[TarPart]:
    """A tar of images in parts; `label_of` gives the label of a member's name."""
    members: list[tarfile.TarInfo] = []

    def part(end: int) -> TarPart:
        start = members[0].offset
        labels = tuple(label_of(each.name) for each in members) if label_of else NO_LABEL
        return TarPart(path, path.name, start, end - start, labels, len(members))

    for member in tar_files(path):
        size = member.offset_data + member.size - members[0].offset if members else 0
        if size > most_bytes or len(members) == most_count:
            yield part(member.offset)
            members = []
        members.append(member)
    if members:
        yield part(members[-1].offset_data + members[-1].size)


def tar_files(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, by their headers alone where it is not compressed."""
    with tarfile.open(path) as tar:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # or it keeps a million headers
            if member.isfile():
                yield member


def runs(sizes: Sequence[int], most_bytes: int, most_count: int) -> Iterator[slice]:
    """Neighbours together, up to so many bytes and so many of them in a run."""
    start = total = 0
    for number, size in enumerate(sizes):
        if number > start and (total + size > most_bytes or number - start == most_count):
            yield slice(start, number)
            start, total = number, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))
