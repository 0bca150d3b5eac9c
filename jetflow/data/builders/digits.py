"""Handwritten digits of 8x8 pixels, with labels, as they ship with scikit-learn."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

NUM_TRAIN = 1500  # of 1,797

_DESCRIPTION = """
1,797 grey-scale images of handwritten digits, 8x8 pixels: scikit-learn's `load_digits`, which is
the test set of the UCI "Optical Recognition of Handwritten Digits". The 17 grey levels 0..16 are
stored as round(level * 255 / 16). In the original file other people wrote the last part, so the
1,500 train and 297 test images are the first and the last of a fixed permutation,
`numpy.random.default_rng(0).permutation(1797)`; the same person may have written in both splits.
"""

_CITATION = """
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """uint8 [8, 8, 1] images with labels 0..9; splits train (1,500) and test (297)."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        # Bytes, not PNG: see photos.py.
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes")
        label = tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            citation=_CITATION,
            license="CC BY 4.0 (UCI Machine Learning Repository)",
            disable_shuffling=True,  # the permutation above is the order on disk
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        order = np.random.default_rng(0).permutation(1797)
        return {
            "train": self._generate_examples(order[:NUM_TRAIN]),
            "test": self._generate_examples(order[NUM_TRAIN:]),
        }

    def _generate_examples(self, rows: np.ndarray):
        from sklearn.datasets import load_digits  # slow to import and needed only here, once

        digits: Any = load_digits()
        images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
        for key, row in enumerate(rows):
            yield key, {"image": images[row], "label": int(digits.target[row])}
