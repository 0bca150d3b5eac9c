"""Small colour crops of the two photographs that ship with scikit-learn, without labels."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

CROP_SIZES = (8, 16, 32, 64)
PICTURES = ("china", "flower")
NUM_TRAIN = 32_768
NUM_TEST = 512

_HEIGHT, _WIDTH = 427, 640  # of both photographs
_BORDER = 512  # train crops end left of this column, test crops begin at it or right of it

_DESCRIPTION = f"""
Square colour crops of the two photographs of scikit-learn's `load_sample_images`, china.jpg and
flower.jpg, taken alternately. The {NUM_TRAIN:,} train crops lie wholly in the columns
0..{_BORDER - 1}, at positions uniform over all that fit; the {NUM_TEST} test crops lie wholly in
the columns {_BORDER}..{_WIDTH - 1}: the splits share no pixel, but they do share two scenes.
Positions come from `numpy.random.default_rng` with seed 0 for train and 123 for test. A config that
names a picture has as many crops, at the same positions, of that one alone. Enough to see that a
model of colour images learns; not a benchmark.
"""


def corners_of_train(size: int) -> Iterator[tuple[int, int, int]]:
    """(picture, top row, left column) of every train crop, in order; all in pixels."""
    rng = np.random.default_rng(0)
    for k in range(NUM_TRAIN):
        top, left = rng.integers(0, _HEIGHT - size + 1), rng.integers(0, _BORDER - size + 1)
        yield k % 2, int(top), int(left)


def corners_of_test(size: int) -> Iterator[tuple[int, int, int]]:
    """(picture, top row, left column) of every test crop, in order; all in pixels.

    These 512 crops are a fixed evaluation set: the exclusive upper bounds, which leave out the last
    row and column, are part of its definition.
    """
    rng = np.random.default_rng(123)
    for k in range(NUM_TEST):
        top, left = rng.integers(0, _HEIGHT - size), rng.integers(_BORDER, _WIDTH - size)
        yield k % 2, int(top), int(left)


@dataclasses.dataclass
class PhotosConfig(tfds.core.BuilderConfig):
    """Attributes: size, of a crop in pixels; picture, one of `PICTURES`, or None for both."""

    size: int = 0
    picture: str | None = None


def _config(picture: str | None, size: int) -> PhotosConfig:
    return PhotosConfig(
        name=f"{picture or ''}{size}",
        description=f"Crops of {size}x{size} pixels of {picture or 'both photographs'}.",
        size=size,
        picture=picture,
    )


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """uint8 [size, size, 3] crops; splits train (32,768) and test (512).

    One config per size, "16", and one per picture and size, "china16".
    """

    name = "photos"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        _config(picture, size) for picture in (None, *PICTURES) for size in CROP_SIZES
    ]

    @property
    def settings(self) -> PhotosConfig:
        """The config; TFDS takes the first where none is named."""
        assert isinstance(self.builder_config, PhotosConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        # Bytes, which ArrayRecord compresses by zstd: crops of 64x64 take 30 % more on disk than as
        # PNG, and are read with far less work (benchmarks/tfdata_reading.py).
        size = self.settings.size
        image = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"image": image}),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_sample_images.html",
            license=(
                "CC BY 2.0; china.jpg: https://www.flickr.com/photos/danielbuechele/6061409035/, "
                "flower.jpg: https://www.flickr.com/photos/vultilion/6056698931/"
            ),
            disable_shuffling=True,  # the order of the corners is the order on disk
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        size = self.settings.size
        return {
            "train": self._generate_examples(corners_of_train(size)),
            "test": self._generate_examples(corners_of_test(size)),
        }

    def _generate_examples(self, corners: Iterator[tuple[int, int, int]]):
        from sklearn.datasets import load_sample_images  # slow to import, needed only here, once

        size, name = self.settings.size, self.settings.picture
        pictures = load_sample_images().images  # uint8 [427, 640, 3] each, as in PICTURES
        for key, (alternate, top, left) in enumerate(corners):
            picture = pictures[PICTURES.index(name) if name else alternate]
            yield key, {"image": picture[top : top + size, left : left + size]}
