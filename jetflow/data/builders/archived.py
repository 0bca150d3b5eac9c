"""What the builders of data sets from archives share: they say what lies where, this writes it.

The images are decoded and written by all cores, in pieces that survive a kill (see `pieces.py`); in
the end they become the shards of the data set at once.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from jetflow.data import images, pieces, processes, records, shards
from jetflow.data.parts import DAMAGE, Part
from jetflow.data.pieces import HeldOut, Note, Piece
from jetflow.types import UsageError

UNREADABLE = "unreadable.tsv"  # name and reason of each image that was left out


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that the user has to bring.

    Attributes:
        name: as published.
        size: as published, in bytes, or in words where that is not known exactly.
        instead: other files or folders that hold the same and will do.
    """

    name: str
    size: int | str
    instead: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f"{self.size:,} bytes" if isinstance(self.size, int) else self.size
        instead = f", or {' or '.join(self.instead)}" if self.instead else ""
        return f"{self.name} ({size}{instead})"

    def find(self, folder: Path) -> Path | None:
        found = (folder / name for name in (self.name, *self.instead))
        return next((path for path in found if path.exists()), None)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split.

    Attributes:
        parts: in the order of the data set; may be made as they are asked for.
        held_out: images of them that make another split.
    """

    name: str
    parts: Iterable[Part]
    held_out: HeldOut | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the preparing is.

    Attributes:
        images, unreadable: images written, and files left out.
        bytes_read, bytes_in_all: as unpacked, but for those of a first pass.
        is_first_pass: whether this is the search for what a compressed archive holds.
    """

    images: int
    unreadable: int
    bytes_read: int
    bytes_in_all: int
    is_first_pass: bool = False


class ArchiveBuilder(FileReaderBuilder, skip_registration=True):
    """uint8 [size, size, 3] images from archives in `manual_dir`.

    A builder says in `_splits` what the archives hold, in `_to_pixels` what becomes of an image.

    Attributes:
        archives: what has to lie in `manual_dir`.
        workers, on_progress: set by whoever prepares: TFDS's `download_and_prepare` has no
            arguments for them.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    LABELLED: ClassVar[bool] = True
    HOMEPAGE: ClassVar[str] = ""
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str] = ""

    # A piece is what a kill may cost, and what a process does at a time: half a minute for it.
    PIECE_BYTES: ClassVar[int] = 512 * 2**20
    PIECE_IMAGES: ClassVar[int] = 16_384
    SHARD_IMAGES: ClassVar[int] = 1024  # a shard has at least so many: small pieces are joined

    archives: Sequence[Archive]
    workers: int = processes.cores()
    on_progress: Callable[[Progress], None] = staticmethod(lambda progress: None)

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        assert self.builder_config is not None  # TFDS takes the first config where none is named
        return int(self.builder_config.name.rsplit("/", 1)[-1])

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        """The names of the classes, and the splits; `found` has each archive by its name."""
        raise NotImplementedError

    def _to_pixels(self) -> Callable[[Any], np.ndarray]:
        """A function of a module, or a partial of one: it is sent to other processes."""
        return functools.partial(resized, size=self.size)

    def _resize_method(self) -> str:
        return images.resize_method(self.size)

    @property
    def partial_dir(self) -> Path:
        """Where the pieces lie until all are there."""
        # Not `data_dir`, which is another folder while TFDS prepares.
        return Path(self.data_dir_root, f"{self.info.full_name}.partial")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=pieces.image_features(self.size, self.LABELLED),
            supervised_keys=("image", "label") if self.LABELLED else None,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            metadata=tfds.core.MetadataDict(resize=self._resize_method()),
            disable_shuffling=True,  # the order of the archive is the order on disk
        )

    def missing(self, folder: Path) -> str:
        """What lacks in a folder, as the end of an error message; "" if nothing does."""
        if all(archive.find(folder) for archive in self.archives):
            return ""
        wanted = "; ".join(map(str, self.archives))
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        there = there or ("nothing" if folder.is_dir() else "no such folder")
        source = f" (from {self.HOMEPAGE})" if self.HOMEPAGE else ""
        return f"expected in {folder}: {wanted}{source}; found there: {there}"

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        """TFDS calls this with `data_dir` set to a folder that it renames when all is done."""
        del dl_manager  # there is nothing to download
        manual_dir = download_config and download_config.manual_dir
        folder = Path(manual_dir or Path(self.data_dir_root, "downloads", "manual"))
        if missing := self.missing(folder):
            raise UsageError(f"data set {self.name} lacks archives: {missing}")
        paths = {archive.name: archive.find(folder) for archive in self.archives}
        found = {name: path for name, path in paths.items() if path}
        self._warn_of_sizes(found)
        self._forget_pieces_of_others(found)
        try:
            classes, splits = self._splits(found)
            if self.LABELLED:
                features: Any = self.info.features
                features["label"].names = classes
            total = _bytes_to_read(splits) or sum(map(size_on_disk, found.values()))
            notes = self._write(self._pieces(splits, len(classes)), total)
            _check_splits(splits, notes, folder)
        except DAMAGE as error:
            raise UsageError(
                f"an archive of {self.name} in {folder} is damaged, or not what its name says "
                f"({error}); bring it again, and run the same command"
            ) from error
        self._publish(notes)

    def _warn_of_sizes(self, found: dict[str, Path]) -> None:
        for archive in self.archives:
            path = found[archive.name]
            size = path.stat().st_size
            if path.name == archive.name and isinstance(archive.size, int) and size != archive.size:
                say(f"{path} has {size:,} bytes; the published file has {archive.size:,}")

    def _forget_pieces_of_others(self, found: dict[str, Path]) -> None:
        """Remove what was made of archives that have been brought again since."""
        states = {name: path.stat() for name, path in found.items() if path.is_file()}
        here = json.dumps({name: [one.st_size, one.st_mtime_ns] for name, one in states.items()})
        note = self.partial_dir / "archives.json"
        if note.exists() and note.read_text("utf-8") != here:
            say(f"{self.partial_dir} was begun with other archives; starting anew")
            for path in self.partial_dir.iterdir():
                path.unlink()
        note.write_text(here, "utf-8")

    def _pieces(self, splits: Sequence[Split], classes: int) -> Iterator[Piece]:
        index = 0
        for split in splits:
            for parts in _in_pieces(split.parts, self.PIECE_BYTES, self.PIECE_IMAGES):
                yield Piece(
                    index, split.name, parts, self._to_pixels(), self.size,
                    classes if self.LABELLED else None, split.held_out,
                )  # fmt: skip
                index += 1

    def _write(self, all_pieces: Iterable[Piece], total: int) -> list[Note]:
        """Write every piece, and take the checksums of the splits as they come."""
        notes, images_done, left_out, bytes_read = [], 0, 0, 0
        digests: dict[str, Any] = {}
        for piece, note in pieces.write_all(self.partial_dir, all_pieces, self.workers):
            notes.append(note)
            for split in note.splits:
                digest = digests.setdefault(split, hashlib.sha256())
                self._digest(digest, pieces.record_file(self.partial_dir, note.index, split))
            images_done += note.images
            left_out += len(note.unreadable)
            bytes_read += sum(part.size for part in piece.parts)
            self.on_progress(Progress(images_done, left_out, bytes_read, total))
        checksums = {split: digest.hexdigest()[:16] for split, digest in digests.items()}
        metadata: Any = self.info.metadata
        metadata.update(checksums=checksums, unreadable=left_out)
        return notes

    def _digest(self, digest: Any, path: Path) -> None:
        features: Any = self.info.features
        has_classes = self.LABELLED and features["label"].num_classes
        for record in shards.read_records(path):
            example = records.decode(record, features)
            label = example["label"] if has_classes else None
            records.update_checksum(digest, example["image"], label)

    def _publish(self, notes: list[Note]) -> None:
        """Make the pieces the shards of the splits, in `data_dir`, which TFDS then renames."""
        infos = [
            shards.make(
                self.partial_dir, notes, split, self._get_filename_template(split_name=split),
                self.SHARD_IMAGES,
            )
            for split in dict.fromkeys(split for note in notes for split in note.splits)
        ]  # fmt: skip
        self.info.set_splits(tfds.core.SplitDict(infos))
        rows = [map(one_line, each) for note in notes for each in note.unreadable]
        text = "".join("\t".join(row) + "\n" for row in rows)
        (Path(self.data_dir) / UNREADABLE).write_text(text, "utf-8")

    def _post_download_and_prepare_hook(self) -> None:
        self.tidy_up()

    def tidy_up(self) -> None:
        """Remove the pieces of data that is complete, which a kill in the last second leaves."""
        shutil.rmtree(self.partial_dir, ignore_errors=True)  # perhaps another process does, too


class PublishedBuilder(ArchiveBuilder, skip_registration=True):
    """Images that are taken as they are, `SIZE` x `SIZE` pixels."""

    SIZE: ClassVar[int]
    RESIZE_METHOD: ClassVar[str] = images.AS_PUBLISHED

    @property
    def size(self) -> int:
        return self.SIZE

    def _to_pixels(self) -> Callable[[Any], np.ndarray]:
        return functools.partial(as_published, size=self.SIZE)

    def _resize_method(self) -> str:
        return self.RESIZE_METHOD


def _check_splits(splits: Sequence[Split], notes: Sequence[Note], folder: Path) -> None:
    filled = {name for note in notes for name in note.splits}
    left_out = [each for note in notes for each in note.unreadable]
    first = f"; left out were {len(left_out):,} files, first {left_out[0]}" if left_out else ""
    for split in splits:
        if split.name not in filled:
            raise UsageError(f"{folder} has not one readable image for split {split.name}{first}")


def one_line(name: str) -> str:
    """A name that holds neither tabs nor line breaks nor what is not UTF-8: they are escaped."""
    odd = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
    return odd.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def resized(content: bytes, size: int) -> np.ndarray:
    """An image file of any kind and size, as uint8 [size, size, 3]."""
    return images.resize(images.decode(content), size)


def as_published(content: bytes | np.ndarray, size: int) -> np.ndarray:
    """Pixels, or an image file of this very size, as uint8 [size, size, 3]."""
    return (
        content if isinstance(content, np.ndarray) else images.exactly(images.decode(content), size)
    )


def _bytes_to_read(splits: Sequence[Split]) -> int | None:
    """All parts together, where they are known beforehand."""
    sizes = []
    for split in splits:
        if not isinstance(split.parts, Sequence):
            return None
        sizes += [part.size for part in split.parts]
    return sum(sizes)


def size_on_disk(path: Path) -> int:
    """Of a file, or of all files in a folder, in bytes."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size


def _in_pieces(parts: Iterable[Part], most_bytes: int, most_images: int) -> Iterator[tuple]:
    """Neighbouring parts together, as long as they stay below both limits."""
    together, size, count = [], 0, 0
    for part in parts:
        if together and (size + part.size > most_bytes or count + part.count > most_images):
            yield tuple(together)
            together, size, count = [], 0, 0
        together.append(part)
        size, count = size + part.size, count + part.count
    if together:
        yield tuple(together)
