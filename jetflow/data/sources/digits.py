"""Handwritten digits of 8x8 pixels, with labels, as they ship with scikit-learn.

scikit-learn's `load_digits` is the test set of the UCI data set (E. Alpaydin and C. Kaynak, doi
10.24432/C50P49, CC BY 4.0). The 17 grey levels 0..16 are stored as round(level * 255 / 16). Other
people wrote the last part of the file, so the images are shuffled by
`numpy.random.default_rng(0).permutation(1797)`. The same person may have written in both splits.
"""

from collections.abc import Iterator

import numpy as np

from jetflow.data.source import Image, made

COUNTS = {"train": 1500, "test": 297}


def images(split: str) -> Iterator[Image]:
    from sklearn.datasets import load_digits  # slow to import and needed only here, once

    order = np.random.default_rng(0).permutation(sum(COUNTS.values()))
    levels, labels = load_digits(return_X_y=True)
    pixels = np.round(levels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    for row in order[: COUNTS["train"]] if split == "train" else order[COUNTS["train"] :]:
        yield Image(f"row {row}", pixels[row], int(labels[row]))


CLASSES = tuple("0123456789")
SOURCES = (made(images, COUNTS, CLASSES, name="digits", image_shape=(8, 8, 1), about=__doc__),)
