"""The two small ImageNets, whose likelihoods cannot be compared with each other.

"Old" is that of van den Oord et al. 2016 (arXiv 1601.06759), of the PixelRNN paper and of most
likelihoods since: without labels, in the order of the archives; how it was resized was not
published. "New" is that of Chrabaszcz et al. 2017 (arXiv 1707.08819): resized with a box filter,
easier to compress, with labels. Its class k is label k + 1 of the published batches, whose order of
the classes is not the alphabetical one.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from jetflow.data.archives import batches, entries, image
from jetflow.data.source import Archive, Contents, Source


def _old_contents(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    train, validation = (
        [image(entry, f"{path.name}/{entry.name}") for entry in entries(path)] for path in paths
    )
    return Contents((), {"train": train, "validation": validation})


def _old(size: int, train_bytes: int, validation_bytes: int) -> Source:
    train = Archive(f"train_{size}x{size}.tar", train_bytes)
    return Source(
        name=f"imagenet{size}_old",
        image_shape=(size, size, 3),
        contents=_old_contents,
        about=__doc__,
        splits={"train": 1_281_149, "validation": 49_999},
        archives=(train, Archive(f"valid_{size}x{size}.tar", validation_bytes)),
        homepage="http://image-net.org/small/download.php",
        resize="none (pixels as published)",
    )


def _new_contents(size: int, paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    *train_paths, validation_path = paths
    train = batches(train_paths, r"train_data_batch_(\d+)(\.npz)?", range(1, 11), size, 1)
    validation = batches([validation_path], r"val_data()(\.npz)?", [0], size, 1)
    classes = [str(label) for label in range(1, 1001)]
    return Contents(classes, {"train": train, "validation": validation})


def _new(size: int, **archive_bytes: int) -> Source:
    stems = {f"Imagenet{size}_{part}": count for part, count in archive_bytes.items()}
    return Source(
        name=f"imagenet{size}_new",
        image_shape=(size, size, 3),
        contents=functools.partial(_new_contents, size),
        about=__doc__,
        splits={"train": 1_281_167, "validation": 50_000},
        num_classes=1000,
        archives=tuple(  # of .npz, of pickles, or either one unpacked
            Archive(f"{stem}_npz.zip", count, (f"{stem}.zip", f"{stem}_npz", stem))
            for stem, count in stems.items()
        ),
        homepage="https://image-net.org/download-images",
        resize="box filter, by its publishers",
    )


SOURCES = (
    _old(64, 12_112_588_800, 477_255_680),
    _old(32, 4_113_018_880, 161_474_560),
    _new(64, train_part1=6_783_426_789, train_part2=6_780_506_068, val=529_522_927),
    _new(32, train=3_580_435_279, val=139_697_668),
)
