"""Members of archives, read where they lie, without unpacking the archive."""

import dataclasses
import functools
import gzip
import io
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jetflow.data.images import Unreadable
from jetflow.data.source import Image
from jetflow.types import NO_LABEL, UsageError

# What a damaged archive raises as a whole; a damaged image in it is an `Unreadable`.
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, pickle.UnpicklingError)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageMember:
    """An image file: `size` bytes of a folder's file or of a tar, or a member of a zip.

    Attributes:
        path: of the file, or of the archive.
        name: below the folder or in the archive.
        offset: of its bytes in `path`; None in a zip.
    """

    path: Path
    name: str
    size: int
    label: int = NO_LABEL
    offset: int | None = 0

    def read(self) -> Iterator[Image]:
        try:
            content = self._content()
        except (FileNotFoundError, PermissionError) as error:
            content = Unreadable(str(error.strerror))
        except DAMAGE as error:
            content = Unreadable(f"damaged in the zip: {error}")
        except OSError as error:
            raise _unread(self.path, error) from error
        yield Image(self.name, content, self.label)

    def _content(self) -> bytes:
        if self.offset is None:
            return _open_zip(self.path, self.path.stat().st_mtime_ns).read(self.name)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@functools.lru_cache(maxsize=1)
def _open_zip(path: Path, modified: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A tar of images of one class: the bytes [offset, offset + size) of `path`."""

    path: Path
    name: str
    size: int
    label: int
    offset: int = 0

    def read(self) -> Iterator[Image]:
        number = 0
        try:
            for name, content in self._files():
                number += 1
                yield Image(f"{self.name}/{name}", content, self.label)
        except DAMAGE as error:
            reason = f"the tar is damaged behind its file number {number}: {error}"
            yield Image(self.name, Unreadable(reason))
        except OSError as error:
            raise _unread(self.path, error) from error

    def _files(self) -> Iterator[tuple[str, bytes]]:
        end = self.offset + self.size
        if not self.size:
            raise tarfile.ReadError("it is empty")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                while (member := tar.next()) and member.offset < end:
                    if member.isfile() and member.offset_data + member.size > end:
                        raise tarfile.ReadError(f"it ends within {member.name}")
                    if (content := tar.extractfile(member)) is not None:
                        yield member.name, content.read()

    def copied(self, stream: gzip.GzipFile, target: Path) -> "TarMember":
        """The same, of a compressed `path` that `stream` reads: its bytes go to `target`."""
        stream.seek(self.offset)
        with open(target, "ab") as file:
            offset, left = file.tell(), self.size
            while left and (block := stream.read(min(left, 2**20))):
                left -= file.write(block)
        return dataclasses.replace(self, path=target, offset=offset)


def _unread(path: Path, error: OSError) -> UsageError:
    """A disk or a network failed: the next start may find it mended."""
    return UsageError(
        f"cannot read {path} ({error.strerror}); run the same command again when it can be read: "
        "what is finished is kept"
    )


_ERRORS: Any = tarfile  # has more of them than type checkers know


class _Header(tarfile.TarInfo):
    """A header as it should be; `tarfile` takes a damaged or a cut one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except (_ERRORS.InvalidHeaderError, _ERRORS.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def tar_files(
    path: Path, on_read: Callable[[int], object] = lambda position: None
) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, by their headers alone where it is not compressed.

    Args:
        path: of the tar.
        on_read: told from time to time how far in the file on disk that is.
    """
    with open(path, "rb") as file, tarfile.open(fileobj=file, tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # or it keeps a million headers
            on_read(file.tell())
            if member.isfile():
                yield member


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


# Batches of small images.


@dataclasses.dataclass(frozen=True)
class BatchMember:
    """An .npz, or a pickle, with `labels`, and with `data`: uint8 rows, one colour after another.

    An .npz is read row by row, a pickle lies in memory as a whole.

    Attributes:
        path, name: a zip, a tar or a folder, and the batch within.
        image_size: H and W.
        first_label: of the batch's first class.
    """

    path: Path
    name: str
    size: int
    image_size: int
    first_label: int

    def read(self) -> Iterator[Image]:
        shape = (3, self.image_size, self.image_size)
        with _files(self.path)[self.name][1]() as file:
            is_npz = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            for number, (row, label) in enumerate((_npz_rows if is_npz else _pickled_rows)(file)):
                pixels = np.frombuffer(row, np.uint8).reshape(shape).transpose(1, 2, 0)
                yield Image(f"{self.name} row {number}", pixels, int(label) - self.first_label)


def batches(
    paths: Sequence[Path], wanted: str, numbers: Sequence[int], image_size: int, first_label: int
) -> list[BatchMember]:
    """The batches of some archives, in the order of their numbers.

    Args:
        paths: zips, tars or folders.
        wanted: matches a batch's file name; its first group is the number, or empty, which is 0.
        numbers: of the batches that are expected.

    Raises:
        UsageError: a batch is missing, or a second one has its number.
    """
    members = sorted(
        (int(match[1] or 0), path, name, size)
        for path in paths
        for name, (size, _) in _files(path).items()
        if (match := re.fullmatch(wanted, PurePosixPath(name).name))
    )
    if (present := [number for number, *_ in members]) != list(numbers):
        raise UsageError(
            f"expected files like {wanted} with the numbers {list(numbers)} in "
            f"{' and '.join(map(str, paths))}, found {present}; bring the archives again"
        )
    return [BatchMember(*member[1:], image_size, first_label) for member in members]


def _files(path: Path) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name → (size, function that opens it) of the files of a folder, a zip or a small tar."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        return {
            file.relative_to(path).as_posix(): (
                file.stat().st_size, functools.partial(open, file, "rb")
            )
            for file in files
        }  # fmt: skip
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        return {
            each.filename: (each.file_size, functools.partial(archive.open, each))
            for each in archive.infolist()
        }
    tar = tarfile.open(path)  # noqa: SIM115 (what is returned reads it)
    return {
        each.name: (each.size, functools.partial(tar.extractfile, each))
        for each in tar
        if each.isfile()
    }


def _npz_rows(file: Any) -> Iterator[tuple[bytes, Any]]:
    with zipfile.ZipFile(file) as npz:
        with npz.open("labels.npy") as column:
            labels = np.load(column)
        with npz.open("data.npy") as data:
            version = np.lib.format.read_magic(data)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(data)
            if version != (1, 0) or fortran_order or dtype != np.uint8 or len(shape) != 2:
                raise zipfile.BadZipFile(f"data.npy holds {dtype} {shape}; expected rows of uint8")
            for label in labels:
                yield data.read(shape[1]), label


def _pickled_rows(file: Any) -> Iterator[tuple[bytes, Any]]:
    batch = _BatchUnpickler(io.BytesIO(file.read()), encoding="bytes").load()
    batch = {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
    for row, label in zip(batch["data"], batch["labels"], strict=True):
        yield row.tobytes(), label


class _BatchUnpickler(pickle.Unpickler):
    """Makes numpy arrays and plain values; anything else in the file is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if wanted not in _ALLOWED:
            raise pickle.UnpicklingError(f"the batch asks for {wanted}, which is no array")
        return _ALLOWED[wanted]


_ALLOWED = {
    "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    # How protocol 2 writes bytes, and none.
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    "__builtin__.bytes": lambda: b"",
}
