"""A data set before it is prepared: what it is, and what its archives hold."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jetflow.data import images
from jetflow.types import NO_LABEL, Shape, Standard, UsageError, is_arrays


def entries(shape: Shape) -> np.dtype:
    """The type of the entries of an image, or of an array, of this shape."""
    return np.dtype(np.float32 if is_arrays(shape) else np.uint8)


def unread(name: str | Path, error: OSError) -> UsageError:
    """A disk or a network failed: the next start may find it mended."""
    return UsageError(
        f"cannot read {name} ({error.strerror}); run the same command again when it can be read: "
        "what is finished is kept"
    )


class Image(NamedTuple):
    """An image as its archive holds it.

    Attributes:
        name: its place, for people: "n01440764.tar/n01440764_10026.JPEG".
        content: an image file, or a function that reads it in any thread, or pixels, uint8
            [H, W, C], or an array, float32 [T, D], or the reason why there is neither.
        label: the number of its class, or `NO_LABEL`.
    """

    name: str
    content: bytes | Callable[[], bytes] | np.ndarray | images.Unreadable
    label: int = NO_LABEL


class Member(NamedTuple):
    """A part of an archive, which holds one image or many: `size` bytes, read at most once."""

    size: int
    images: Iterable[Image]


def grouped(members: Sequence[Member], most_bytes: int, most_members: int) -> list[list[Member]]:
    """Neighbours: up to so many bytes, and up to so many of them."""
    groups: list[list[Member]] = []
    size = 0
    for member in members:
        size += member.size
        if not groups or size > most_bytes or len(groups[-1]) == most_members:
            groups.append([])
            size = member.size
        groups[-1].append(member)
    return groups


class Contents(NamedTuple):
    """What the archives hold.

    Attributes:
        classes: their names.
        splits: the members of each, in order.
        left_out: folders that belong to no split, or to no class, and how many images each has.
        shape: of each image, where the source does not know it.
        standard: of arrays, the mean and the standard deviation of each feature in training.
    """

    classes: Sequence[str]
    splits: Mapping[str, Sequence[Member]]
    left_out: Mapping[str, int] = {}
    shape: Shape = ()
    standard: Standard | None = None


class Archive(NamedTuple):
    """A file that the user brings.

    Attributes:
        name: as published.
        size: as published, in bytes, or in words where that is not known exactly.
        instead: other files or folders with the same content.
        is_optional: whether the data set can do without.
    """

    name: str
    size: int | str
    instead: tuple[str, ...] = ()
    is_optional: bool = False

    def __str__(self) -> str:
        size = f"{self.size:,} bytes" if isinstance(self.size, int) else self.size
        return f"{self.name} ({size}{''.join(f', or {name}' for name in self.instead)})"

    def find(self, folder: Path) -> Path | None:
        """Its path, or that of another one with the same content; None where there is neither."""
        paths = (folder / name for name in (self.name, *self.instead))
        return next((path for path in paths if os.path.exists(path)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A data set.

    Attributes:
        name: "cifar10", or with its size: "photos/16".
        image_shape: (H, W, C), or of arrays (T, D); () where only the archive tells.
        contents: of the archives, given their paths, a folder for notes, and the limit of pixels.
        about: description and references, for the record.
        splits: the published number of images in each; empty where it is not known.
        num_classes: as published; 0 where the images have no labels.
        held_out: one image of so many of `train` is part of `validation`, by a hash of its file's
            name; 0 for none.
        archives: that `contents` needs.
        is_read: whether a file of an archive that is a folder is of use.
        homepage: where they are published.
        resize: how its publishers resized the images; None for photographs, which are resized here.
    """

    name: str
    image_shape: Shape
    contents: Callable[[Sequence[Path], Path, int], Contents]
    about: str | None
    splits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    num_classes: int = 0
    held_out: int = 0
    archives: tuple[Archive, ...] = ()
    is_read: Callable[[Path], bool] = os.path.exists
    homepage: str = ""
    resize: str | None = "none"

    def pixels(self, image: Image, max_pixels: int = images.MAX_PIXELS) -> np.ndarray:
        """uint8 [H, W, C] of an image.

        Raises:
            Unreadable: it is no whole image, or not of the published size, or larger than allowed.
        """
        content = image.content
        if isinstance(content, images.Unreadable):
            raise content
        if isinstance(content, np.ndarray):
            return content
        fit = images.resize if self.resize is None else images.exactly
        content = content if isinstance(content, bytes) else content()
        return fit(images.decode(content, max_pixels), self.image_shape[0])

    def count(self, split: str) -> int:
        """The published number of images in a split, or in a part as TFDS writes it.

        Raises:
            UsageError: there is no such split.
        """
        infos = {name: SimpleNamespace(num_examples=count) for name, count in self.splits.items()}
        try:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (AssertionError, ValueError) as error:
            counts = ", ".join(f"{name} ({count:,})" for name, count in self.splits.items())
            raise UsageError(f"{split!r} is no split of {self.name}; it has {counts}") from error
        return sum(len(range(self.splits[each.splitname])[each.from_ : each.to]) for each in parts)

    def differences(self, counts: Mapping[str, int], unreadable: int = 0) -> list[str]:
        """A line for each split whose number of images is not the published one.

        Args:
            counts: images in each split of the prepared data.
            unreadable: images that were left out, of any split.
        """
        pairs = {split: (counts.get(split, 0), count) for split, count in self.splits.items()}
        if self.held_out:  # only the sum is published
            prepared, published = zip(*pairs.values(), strict=True)
            pairs = {"+".join(pairs): (sum(prepared), sum(published))}
        return [
            f"{self.name} {split}: {prepared:,} images, but {published:,} were published; is the "
            "archive whole?"
            for split, (prepared, published) in pairs.items()
            if not 0 <= published - prepared <= unreadable
        ]

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has all its archives."""
        return all(each.is_optional or each.find(folder) for each in self.archives)

    def paths(self, folder: Path) -> list[Path]:
        """Of its archives, in a folder.

        Raises:
            UsageError: some are missing.
        """
        if not self.is_in(folder):
            raise UsageError(
                f"data set {self.name!r} lacks archives: {self.needs(folder)}; put them there, or "
                "give another --manual_dir"
            )
        return [path for archive in self.archives if (path := archive.find(folder))]

    def needs(self, folder: Path) -> str:
        """What it needs in a folder, and what is there, for an error message."""
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        names[8:] = [f"{len(names) - 8} more"] if len(names) > 8 else []
        present = ", ".join(names) or ("nothing" if folder.is_dir() else "no such folder")
        homepage = f" (from {self.homepage})" if self.homepage else ""
        wanted = "; ".join(map(str, self.archives))
        return f"expected in {folder}: {wanted}{homepage}; found there: {present}"


def made(
    images: Callable[[str], Iterable[Image]],
    splits: Mapping[str, int],
    classes: Sequence[str] = (),
    **fields,
) -> Source:
    """A data set of which `images` makes each split, without any archive."""

    def contents(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
        return Contents(classes, {split: [Member(0, images(split))] for split in splits})

    return Source(contents=contents, splits=splits, num_classes=len(classes), **fields)


def at_sizes(name: str, sizes: Sequence[int], **fields) -> tuple[Source, ...]:
    """A data set at several sizes: "afhq/64", "afhq/128", …"""
    return tuple(
        Source(name=f"{name}/{size}", image_shape=(size, size, 3), **fields) for size in sizes
    )


def name_hash(name: str) -> int:
    """The first 8 bytes of the SHA-256 of a file's name, as a big-endian number."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")
