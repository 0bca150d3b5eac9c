"""Parts of archives: runs of images that one process reads by itself, without unpacking them.

A part is small and can be sent to another process; `read` gives its images one after another, so
that memory does not grow with the archive. What is damaged comes as an item too, with the reason.
"""

import dataclasses
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jetflow.data.images import Unreadable
from jetflow.types import NO_LABEL, UsageError

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
        except OSError as error:
            raise _unread(self.path, error) from error


def _members(path: Path, offset: int, size: int) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    with open(path, "rb") as file:
        file.seek(offset)
        if not size:
            raise tarfile.ReadError("it is empty")
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) and member.offset < offset + size:
                if member.isfile() and member.offset_data + member.size > offset + size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if (content := tar.extractfile(member)) is not None:
                    yield member, content


_ERRORS: Any = tarfile  # has more of them than type checkers know


class _Header(tarfile.TarInfo):
    """A header as it should be; `tarfile` takes a damaged or a cut one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except (_ERRORS.InvalidHeaderError, _ERRORS.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


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
                except OSError as error:
                    raise _unread(self.path, error) from error
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
            except (FileNotFoundError, PermissionError) as error:
                content = Unreadable(str(error.strerror))
            except OSError as error:
                raise _unread(self.root / name, error) from error
            yield Item(name, content, label)


def _unread(path: Path, error: OSError) -> UsageError:
    """Of a disk or a network that failed, which the next start may find mended."""
    return UsageError(
        f"cannot read {path} ({error.strerror}); run the same command again when it can be read: "
        "what is finished is kept"
    )


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


def tar_files(
    path: Path, on_read: Callable[[int], None] = lambda position: None
) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, by their headers alone where it is not compressed.

    Args:
        path: of the tar.
        on_read: told from time to time how far in the file, as it lies on the disk, that is.
    """
    with open(path, "rb") as file, tarfile.open(fileobj=file, tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # or it keeps a million headers
            on_read(file.tell())
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
