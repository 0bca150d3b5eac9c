"""What lies in archives, read there in order, without unpacking them."""

import functools
import io
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from jetflow.data.images import Unreadable
from jetflow.data.source import Image, Member, Range, unread
from jetflow.types import NO_LABEL, UsageError

# What a damaged archive raises as a whole; a damaged image in it is an `Unreadable`.
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, pickle.UnpicklingError)
Archive: TypeAlias = Path | io.BufferedIOBase
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


def tar_of_images(path: Path, label: Callable[[str], int] = lambda name: NO_LABEL) -> list[Member]:
    """The images of a tar, each a member; `label` gives that of a file's name."""
    return [
        Member(
            member.size,
            [
                Image(
                    f"{path.name}/{member.name}",
                    Range(path, member.offset_data, member.size),
                    label(member.name),
                )
            ],
        )
        for member in tar_files(path)
    ]


def tar_of_class(archive: Archive, offset: int, size: int, name: str, label: int) -> Member:
    """A tar of images of one class: `size` bytes of an archive, which is read forwards alone."""
    return Member(size, _inner_images(archive, offset, size, name, label))


def _inner_images(
    archive: Archive, offset: int, size: int, name: str, label: int
) -> Iterator[Image]:
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


def zipped_image(archive: zipfile.ZipFile, name: str, label: int) -> Member:
    return Member(archive.getinfo(name).compress_size, _unzipped(archive, name, label))


def _unzipped(archive: zipfile.ZipFile, name: str, label: int) -> Iterator[Image]:
    try:
        content = archive.read(name)
    except DAMAGE as error:
        content = Unreadable(f"damaged in the zip: {error}")
    yield Image(name, content, label)


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
    files = sorted(
        ((int(match[1] or 0), name, size, opened) for path in paths
         for name, (size, opened) in _files(path).items() if (match := re.fullmatch(wanted, name))),
        key=lambda file: file[:2],
    )  # fmt: skip
    if (present := [number for number, *_ in files]) != list(numbers):
        raise UsageError(
            f"expected files like {wanted} with the numbers {list(numbers)} in "
            f"{' and '.join(map(str, paths))}, found {present}; bring the archives again"
        )
    return [
        Member(size, _rows(name, opened, (3, image_size, image_size), first_label))
        for _, name, size, opened in files
    ]


def _files(path: Path) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name → (size, function that opens it) of the files of a folder, a zip or a small tar."""
    if path.is_dir():
        inner = [file for file in path.rglob("*") if file.is_file()]
        return {
            file.name: (file.stat().st_size, functools.partial(open, file, "rb")) for file in inner
        }
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        found = {
            each.filename: (each.file_size, functools.partial(archive.open, each))
            for each in archive.infolist()
        }
    else:
        tar = tarfile.open(path)  # noqa: SIM115 (what is returned reads it)
        found = {each.name: (each.size, functools.partial(tar.extractfile, each)) for each in tar}
    return {PurePosixPath(name).name: file for name, file in found.items()}


def _rows(
    name: str, opened: Callable[[], Any], shape: tuple[int, ...], first_label: int
) -> Iterator[Image]:
    with opened() as file:
        batch = _unpacked(file)
    rows, labels = np.asarray(batch.get("data")), batch.get("labels", ())
    if rows.shape != (len(labels), np.prod(shape)) or rows.dtype != np.uint8:
        raise pickle.UnpicklingError(
            f"{name} has {rows.dtype} {rows.shape} and {len(labels)} labels; expected a row of "
            f"{np.prod(shape):,} uint8 for each"
        )
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pixels = row.reshape(shape).transpose(1, 2, 0)
        yield Image(f"{name} row {number}", pixels, int(label) - first_label)


def _unpacked(file: Any) -> Mapping[str, Any]:
    content = io.BytesIO(file.read())
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
