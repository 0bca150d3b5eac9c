"""What lies in archives, read there in order, without unpacking them."""

import errno
import functools
import gzip
import io
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jetflow.data.images import Unreadable
from jetflow.data.source import Image, Member, unread
from jetflow.types import NO_LABEL, UsageError

# What a damaged archive raises as a whole; a damaged image in it is an `Unreadable`.
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, pickle.UnpicklingError)
_ERRORS: Any = tarfile  # has more of them than type checkers know


class Entry(NamedTuple):
    """A file in an archive.

    Attributes:
        name: below the folder or in the archive.
        read: gives its bytes, or raises `Unreadable`; threads may call it.
        offset: of its bytes in what a tar is when it is not compressed.
        modified: when it was written, in a folder.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    offset: int = 0
    modified: int = 0  # ns


def entries(path: Path) -> Iterator[Entry]:
    """The files of a zip or a tar, in its order, or of a folder, in that of their names.

    Raises:
        UsageError: a link in a folder leads back to one above it, or one cannot be read.
    """
    if path.is_dir():
        try:
            yield from sorted(_tree(path, "", (path.stat(),)))
        except OSError as error:
            raise unread(error.filename or path, error) from error
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        for each in archive.infolist():
            yield Entry(each.filename, each.file_size, functools.partial(_unzipped, archive, each))
    else:
        title = f"{path.name}: first pass"
        with (
            open(path, "rb") as file,
            tarfile.open(fileobj=file, tarinfo=_Header) as tar,
            tqdm(total=path.stat().st_size, desc=title, unit="B", unit_scale=True, delay=5) as bar,
        ):
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # or it keeps a million headers
                bar.update(file.tell() - bar.n)
                if member.isfile():
                    offset, size = member.offset_data, member.size
                    reading = functools.partial(read, path, offset, size)
                    yield Entry(member.name, size, reading, offset)


def _tree(root: Path, folder: str, above: tuple[os.stat_result, ...]) -> Iterator[Entry]:
    """All files but hidden and special ones, links followed."""
    for base in os.listdir(root / folder):
        name = f"{folder}/{base}" if folder else base
        path = root / name
        if base.startswith("."):
            continue
        if path.is_dir():
            if any(os.path.samestat(path.stat(), each) for each in above):
                raise UsageError(f"{path} leads back to a folder above it; remove that link")
            yield from _tree(root, name, (*above, path.stat()))
        elif path.is_file() or not path.exists():  # a link to nothing is listed as unreadable
            state = path.stat() if path.exists() else path.lstat()
            reading = functools.partial(read, path)
            yield Entry(name, state.st_size, reading, modified=state.st_mtime_ns)


class _Header(tarfile.TarInfo):
    """A header as it should be; `tarfile` takes a damaged or a cut one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except (_ERRORS.InvalidHeaderError, _ERRORS.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def opened(path: Path) -> io.BufferedIOBase:
    """A file, uncompressed where it is a gzip."""
    file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_gzip else file


def read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Bytes of a file, all by default; raises `Unreadable` if it is not there, or not for us."""
    try:
        with opened(path) if offset else open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ELOOP):
            raise Unreadable(str(error.strerror)) from error
        raise unread(path, error) from error


def _unzipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except (*DAMAGE, RuntimeError) as error:  # as where it is encrypted, or of unknown compression
        raise Unreadable(f"damaged in the zip: {error}") from error


def image(entry: Entry, name: str, label: int = NO_LABEL) -> Member:
    """An image file."""
    return Member(entry.size, [Image(name, entry.read, label)])


def images_of_tar(
    archive: Path | io.BufferedIOBase, offset: int, size: int, name: str, label: int
) -> Iterator[Image]:
    """Of a tar of one class, `size` bytes of an archive, which is read forwards alone."""
    number, end = 0, offset + size
    try:
        if not size:
            raise tarfile.ReadError("it is empty")
        with open(archive, "rb") if isinstance(archive, Path) else nullcontext(archive) as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                while (member := tar.next()) and member.offset < end:
                    if member.isfile() and member.offset_data + member.size > end:
                        raise tarfile.ReadError(f"it ends within {member.name}")
                    if (content := tar.extractfile(member)) is not None:
                        number += 1
                        yield Image(f"{name}/{member.name}", content.read(), label)
    except DAMAGE as error:
        reason = f"the tar is damaged behind its file number {number}: {error}"
        yield Image(name, Unreadable(reason))
    except OSError as error:
        raise unread(name, error) from error


# Batches of small images: an .npz or a pickle with `labels`, and with `data`, uint8 rows of one
# colour after another.


def batches(
    paths: Sequence[Path], wanted: str, numbers: Sequence[int], image_size: int, first_label: int
) -> list[Member]:
    """The batches of some archives, in the order of their numbers.

    Args:
        paths: zips, tars or folders.
        wanted: matches a batch's file name; its first group is the number, or empty, which is 0.
        numbers: of the batches that are expected.
        image_size: H and W.
        first_label: of the first class.

    Raises:
        UsageError: a batch is missing, or a second one has its number.
    """
    found = [
        (int(match[1] or 0), entry)
        for path in paths
        for entry in entries(path)
        if (match := re.fullmatch(wanted, PurePosixPath(entry.name).name))
    ]
    found.sort(key=lambda each: each[0])
    if (present := [number for number, _ in found]) != list(numbers):
        raise UsageError(
            f"expected files like {wanted} with the numbers {list(numbers)} in "
            f"{' and '.join(map(str, paths))}, found {present}; bring the archives again"
        )
    shape = (3, image_size, image_size)
    return [Member(entry.size, _rows(entry, shape, first_label)) for _, entry in found]


def _rows(entry: Entry, shape: tuple[int, ...], first_label: int) -> Iterator[Image]:
    try:
        batch = _unpacked(io.BytesIO(entry.read()))
    except Unreadable as error:
        raise pickle.UnpicklingError(f"{entry.name}: {error}") from error
    rows, labels = np.asarray(batch.get("data")), batch.get("labels", ())
    if rows.shape != (len(labels), np.prod(shape)) or rows.dtype != np.uint8:
        raise pickle.UnpicklingError(
            f"{entry.name} has {rows.dtype} {rows.shape} and {len(labels)} labels; expected a row "
            f"of {np.prod(shape):,} uint8 for each"
        )
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pixels = row.reshape(shape).transpose(1, 2, 0)
        yield Image(f"{entry.name} row {number}", pixels, int(label) - first_label)


def _unpacked(content: io.BytesIO) -> Mapping[str, Any]:
    try:
        if content.getbuffer()[:4] == b"PK\x03\x04":
            with np.load(content) as npz:
                return {name: npz[name] for name in ("data", "labels")}
        batch = _BatchUnpickler(content, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise pickle.UnpicklingError(f"a batch is damaged ({error})") from error


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
