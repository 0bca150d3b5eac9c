"""ImageNet from its photographs: ILSVRC 2012, and the whole of it in two releases."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from jetflow.data import pieces
from jetflow.data.builders.archived import Archive, ArchiveBuilder, Progress, Split, say
from jetflow.data.parts import TarPart, flat_tar, tar_files
from jetflow.data.pieces import HeldOut, Piece
from jetflow.types import UsageError

_CITATION = """
@article{russakovsky2015imagenet,
  author = {Russakovsky, Olga and Deng, Jia and Su, Hao and others},
  title = {ImageNet Large Scale Visual Recognition Challenge},
  journal = {International Journal of Computer Vision},
  year = {2015},
  eprint = {1409.0575},
}
"""


def _configs(*sizes: int) -> list[tfds.core.BuilderConfig]:
    return [
        tfds.core.BuilderConfig(name=str(size), description=f"Resized to {size}x{size} pixels.")
        for size in sizes
    ]


class ImageNet1k(ArchiveBuilder, skip_registration=True):
    """ILSVRC 2012 at a chosen size; splits train (1,281,167) and validation (50,000)."""

    name = "imagenet1k"
    BUILDER_CONFIGS: ClassVar = _configs(64, 128, 256)
    HOMEPAGE = "https://image-net.org/challenges/LSVRC/2012/"
    CITATION = _CITATION
    DESCRIPTION = """
    The photographs of ILSVRC 2012, cut to squares and resized. Class k is the k-th WordNet id in
    alphabetical order, as usual. The images are in the order of the published archives.
    """
    TRAIN: ClassVar = Archive("ILSVRC2012_img_train.tar", 147_897_477_120)
    VALIDATION: ClassVar = Archive("ILSVRC2012_img_val.tar", 6_744_924_160)
    DEVKIT: ClassVar = Archive("ILSVRC2012_devkit_t12.tar.gz", "about 2.6 MB")
    archives = (TRAIN, VALIDATION, DEVKIT)

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        classes, train = synset_parts(found[self.TRAIN.name], _inner_tars(found[self.TRAIN.name]))
        labels = _validation_labels(found[self.DEVKIT.name], classes)
        validation = flat_tar(
            found[self.VALIDATION.name], self.PIECE_BYTES, self.PIECE_IMAGES,
            functools.partial(_validation_label, labels),
        )  # fmt: skip
        return classes, [Split("train", train), Split("validation", validation)]


def _validation_label(labels: Sequence[int], member: str) -> int:
    """Of "ILSVRC2012_val_00000001.JPEG", the first label."""
    return labels[int(PurePosixPath(member).stem.rpartition("_")[2]) - 1]


def _validation_labels(devkit: Path, classes: Sequence[str]) -> list[int]:
    """The class of each validation image, by number; the devkit counts the classes its own way."""
    import scipy.io  # needed only here, once

    files = {}
    with tarfile.open(devkit) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                files[PurePosixPath(member.name).name] = file.read()
    if lacking := {"meta.mat", "ILSVRC2012_validation_ground_truth.txt"} - set(files):
        raise UsageError(f"{devkit} has no {min(lacking)}; is it the devkit for tasks 1 and 2?")
    synsets: Any = scipy.io.loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
    names = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
    numbers = {name: number for number, name in enumerate(classes)}
    truth = files["ILSVRC2012_validation_ground_truth.txt"].split()
    unknown = {names[int(number)] for number in truth} - set(numbers)
    if unknown:
        raise UsageError(
            f"{len(unknown)} classes of the validation images, {min(unknown)} for one, have no tar "
            "in ILSVRC2012_img_train.tar; is it whole?"
        )
    return [numbers[names[int(number)]] for number in truth]


class ImageNet21k(ArchiveBuilder, skip_registration=True):
    """All of ImageNet, release of winter 2021, at a chosen size; train and a held-out part."""

    name = "imagenet21k"
    BUILDER_CONFIGS: ClassVar = _configs(32, 64)
    HOMEPAGE = "https://image-net.org/download-images"
    CITATION = _CITATION
    HELD_OUT: ClassVar = HeldOut("validation", share=256)
    DESCRIPTION = f"""
    All photographs of a release of ImageNet, cut to squares and resized. There is no official
    validation split: here it is one image of {HELD_OUT.share}, those for which the first 8 bytes of
    the SHA-256 of the file's name ("n01440764_10026.JPEG"), as a big-endian number, are a multiple
    of that. Class k is the k-th WordNet id of the archive in alphabetical order; the images are in
    the order of the archive, or of the ids where it is a folder of tars.
    """
    archives = (
        Archive("winter21_whole.tar.gz", "about 1.2 TB", ("winter21_whole.tar", "winter21_whole")),
    )

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        [path] = found.values()
        if path.is_dir():
            tars = [(tar.name, 0, tar.stat().st_size) for tar in sorted(path.glob("*.tar"))]
        elif _is_gzip(path):
            tars = self._index_of_compressed(path)
        else:
            tars = _inner_tars(path)
        classes, train = synset_parts(path, tars)
        return classes, [Split("train", train, self.HELD_OUT)]

    def _index_of_compressed(self, path: Path) -> list[tuple[str, int, int]]:
        """Noted for the next start: it takes a pass over the whole archive."""
        note = self.partial_dir / "tars.json"
        total = path.stat().st_size
        known = [path.name, total]
        if note.exists() and (content := json.loads(note.read_text("utf-8")))["archive"] == known:
            return [tuple(tar) for tar in content["tars"]]
        say(f"{path} is compressed: looking for its tars takes a first pass over it")
        tars = _inner_tars(
            path, lambda position: self.on_progress(Progress(0, 0, position, total, True))
        )
        unfinished = note.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"archive": known, "tars": tars}), "utf-8")
        unfinished.rename(note)
        return tars

    def _pieces(self, splits: Sequence[Split], classes: int) -> Iterator[Piece]:
        with contextlib.ExitStack() as stack:
            stream = None
            for piece in super()._pieces(splits, classes):
                stretch: Any = piece.parts
                path = stretch[0].path
                if _is_gzip(path) and pieces.read_note(self.partial_dir, piece) is None:
                    stream = stream or stack.enter_context(gzip.open(path))
                    target = self.partial_dir / f"{piece.index:06d}.tar.unfinished"
                    parts = tuple(_copied(stream, stretch, target))
                    piece = dataclasses.replace(piece, parts=parts, spooled=target)
                yield piece


class ImageNet21kFall11(ImageNet21k, skip_registration=True):
    """The same, release of fall 2011."""

    name = "imagenet21k_fall11"
    archives = (Archive("fall11_whole.tar", "about 1.3 TB", ("fall11_whole",)),)


def _copied(stream: gzip.GzipFile, stretch: Sequence[TarPart], target: Path) -> Iterator[TarPart]:
    """Parts of an archive that can only be read forwards, as they then lie in `target`."""
    with open(target, "wb") as file:
        for part in stretch:
            stream.seek(part.offset)
            shift = file.tell() - part.offset
            left = part.size
            while left and (block := stream.read(min(left, 2**20))):
                file.write(block)
                left -= len(block)
            yield dataclasses.replace(part, path=target, shift=shift)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _inner_tars(
    path: Path, on_read: Callable[[int], None] = lambda position: None
) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each tar in a tar."""
    return [
        (PurePosixPath(member.name).name, member.offset_data, member.size)
        for member in tar_files(path, on_read)
        if member.name.endswith(".tar")
    ]


def synset_parts(
    path: Path, tars: Sequence[tuple[str, int, int]]
) -> tuple[list[str], list[TarPart]]:
    """The classes, and a part for each of their tars.

    Args:
        path: the tar that holds them, or their folder.
        tars: (name, offset, size) of each.
    """
    classes = sorted(name.removesuffix(".tar") for name, _, _ in tars)
    if not classes or len(set(classes)) < len(classes):
        raise UsageError(f"{path} holds no tars of classes, n01440764.tar say, or one twice")
    number = {name: label for label, name in enumerate(classes)}
    return classes, [
        TarPart(
            path / name if path.is_dir() else path,
            name, offset, size, number[name.removesuffix(".tar")],
        )
        for name, offset, size in tars
    ]  # fmt: skip
