"""The two small ImageNets, old and new, whose likelihoods cannot be compared with each other."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from jetflow.data import parts
from jetflow.data.builders.archived import Archive, PublishedBuilder, Split
from jetflow.data.builders.batches import rows_parts


class _ImageNetOld(PublishedBuilder, skip_registration=True):
    LABELLED = False
    TRAIN: ClassVar[Archive]
    VALIDATION: ClassVar[Archive]
    HOMEPAGE = "http://image-net.org/small/download.php"
    DESCRIPTION = """
    The small ImageNet of van den Oord et al. 2016, "old": the one of the PixelRNN paper and of most
    likelihoods since, without labels, in the order of the archives. How it was resized was not
    published. Not to be confused with the "new" one, of other resizing and easier to compress.
    """
    CITATION = """
    @inproceedings{oord2016pixel,
      author = {van den Oord, A{\\"a}ron and Kalchbrenner, Nal and Kavukcuoglu, Koray},
      title = {Pixel Recurrent Neural Networks},
      booktitle = {ICML},
      year = {2016},
      eprint = {1601.06759},
    }
    """

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        limits = self.PIECE_BYTES, self.PIECE_IMAGES
        return (), [
            Split("train", parts.flat_tar(found[self.TRAIN.name], *limits)),
            Split("validation", parts.flat_tar(found[self.VALIDATION.name], *limits)),
        ]


class ImageNet64Old(_ImageNetOld, skip_registration=True):
    """uint8 [64, 64, 3]; splits train (1,281,149) and validation (49,999)."""

    name = "imagenet64_old"
    SIZE = 64
    TRAIN = Archive("train_64x64.tar", 12_112_588_800)
    VALIDATION = Archive("valid_64x64.tar", 477_255_680)
    archives = (TRAIN, VALIDATION)


class ImageNet32Old(_ImageNetOld, skip_registration=True):
    """uint8 [32, 32, 3]; splits train (1,281,149) and validation (49,999)."""

    name = "imagenet32_old"
    SIZE = 32
    TRAIN = Archive("train_32x32.tar", 4_113_018_880)
    VALIDATION = Archive("valid_32x32.tar", 161_474_560)
    archives = (TRAIN, VALIDATION)


class _ImageNetNew(PublishedBuilder, skip_registration=True):
    RESIZE_METHOD = "box filter, by its publishers"
    TRAIN: ClassVar[tuple[Archive, ...]]
    VALIDATION: ClassVar[Archive]
    HOMEPAGE = "https://image-net.org/download-images"
    DESCRIPTION = """
    The small ImageNet of Chrabaszcz et al. 2017, "new": resized with a box filter, with labels, in
    the order of the archives. Class k is label k + 1 of the published batches, whose order of the
    classes is not the alphabetical one. Not to be confused with the "old" one of van den Oord.
    """
    CITATION = """
    @article{chrabaszcz2017downsampled,
      author = {Chrabaszcz, Patryk and Loshchilov, Ilya and Hutter, Frank},
      title = {A Downsampled Variant of {ImageNet} as an Alternative to the {CIFAR} datasets},
      year = {2017},
      eprint = {1707.08819},
    }
    """

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        batches = functools.partial(
            rows_parts, image_size=self.size, first_label=1, most_rows=self.PIECE_IMAGES
        )
        train = batches(
            [found[each.name] for each in self.TRAIN], _TRAIN_BATCH, numbers=range(1, 11)
        )
        validation = batches([found[self.VALIDATION.name]], _VALIDATION_BATCH, numbers=[0])
        classes = [str(label) for label in range(1, 1001)]
        return classes, [Split("train", train), Split("validation", validation)]


_TRAIN_BATCH = re.compile(r"train_data_batch_(\d+)(\.npz)?")
_VALIDATION_BATCH = re.compile(r"val_data()(\.npz)?")


def _batches(stem: str, size: int) -> Archive:
    """An .npz archive, or what holds the same: one of pickles, or either one unpacked."""
    instead = (f"{stem}.zip", f"{stem}_npz", stem)
    return Archive(f"{stem}_npz.zip", size, instead)


class ImageNet64New(_ImageNetNew, skip_registration=True):
    """uint8 [64, 64, 3], 1,000 classes; splits train (1,281,167) and validation (50,000)."""

    name = "imagenet64_new"
    SIZE = 64
    TRAIN = (
        _batches("Imagenet64_train_part1", 6_783_426_789),
        _batches("Imagenet64_train_part2", 6_780_506_068),
    )
    VALIDATION = _batches("Imagenet64_val", 529_522_927)
    archives = (*TRAIN, VALIDATION)


class ImageNet32New(_ImageNetNew, skip_registration=True):
    """uint8 [32, 32, 3], 1,000 classes; splits train (1,281,167) and validation (50,000)."""

    name = "imagenet32_new"
    SIZE = 32
    TRAIN = (_batches("Imagenet32_train", 3_580_435_279),)
    VALIDATION = _batches("Imagenet32_val", 139_697_668)
    archives = (*TRAIN, VALIDATION)
