"""Small colour crops of the two photographs that ship with scikit-learn, without labels.

Square crops, taken alternately of both, or of one of them at the same places. Train crops lie in
the columns 0..511, test crops in the columns 512..639: the splits share no pixel, but two scenes.
Enough to see that a model of colour images learns; not a benchmark. The photographs are CC BY 2.0:
china.jpg is https://www.flickr.com/photos/danielbuechele/6061409035/, and flower.jpg is
https://www.flickr.com/photos/vultilion/6056698931/.
"""

import functools
from collections.abc import Iterator

import numpy as np

from jetflow.data.source import Image, made

PICTURES = ("china", "flower")
COUNTS = {"train": 32_768, "test": 512}

_HEIGHT, _WIDTH = 427, 640  # of both photographs
_BORDER = 512  # train crops end left of this column, test crops begin at it or right of it


def corners(split: str, size: int) -> Iterator[tuple[int, int, int]]:
    """(picture, top row, left column) of every crop of a split, in order; all in pixels.

    The test crops never reach the last row and column. That is part of the definition of this fixed
    evaluation set.
    """
    is_train = split == "train"
    rng = np.random.default_rng(0 if is_train else 123)
    first, last = (0, _BORDER - size + 1) if is_train else (_BORDER, _WIDTH - size)
    for number in range(COUNTS[split]):
        top, left = rng.integers(0, _HEIGHT - size + is_train), rng.integers(first, last)
        yield number % 2, int(top), int(left)


def _images(size: int, name: str, split: str) -> Iterator[Image]:
    from sklearn.datasets import load_sample_images  # slow to import, needed only here, once

    pictures = load_sample_images().images  # uint8 [427, 640, 3] each, in the order of PICTURES
    for number, (alternate, top, left) in enumerate(corners(split, size)):
        picture = pictures[PICTURES.index(name) if name else alternate]
        yield Image(f"crop {number}", picture[top : top + size, left : left + size])


SOURCES = tuple(
    made(
        functools.partial(_images, size, picture),
        COUNTS,
        name=f"photos/{picture}{size}",
        image_shape=(size, size, 3),
        about=__doc__,
    )
    for picture in ("", *PICTURES)
    for size in (8, 16, 32, 64)
)
