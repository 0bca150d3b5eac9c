"""CIFAR-10, from the Python version of its archive."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from jetflow.data.builders.archived import Archive, PublishedBuilder, Split
from jetflow.data.builders.batches import rows_parts

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Cifar10(PublishedBuilder, skip_registration=True):
    """uint8 [32, 32, 3], 10 classes; splits train (50,000) and test (10,000)."""

    name = "cifar10"
    SIZE = 32
    HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
    DESCRIPTION = "CIFAR-10, in the order of its batches."
    CITATION = """
    @techreport{krizhevsky2009learning,
      author = {Krizhevsky, Alex},
      title = {Learning Multiple Layers of Features from Tiny Images},
      institution = {University of Toronto},
      year = {2009},
    }
    """
    ARCHIVE: ClassVar = Archive("cifar-10-python.tar.gz", 170_498_071, ("cifar-10-batches-py",))
    archives = (ARCHIVE,)

    def _splits(self, found: dict[str, Path]) -> tuple[Sequence[str], Sequence[Split]]:
        batches = functools.partial(
            rows_parts, [found[self.ARCHIVE.name]], image_size=32, first_label=0,
            most_rows=self.PIECE_IMAGES,
        )  # fmt: skip
        train = batches(re.compile(r"data_batch_(\d)"), numbers=range(1, 6))
        test = batches(re.compile(r"test_batch()"), numbers=[0])
        return CLASSES, [Split("train", train), Split("test", test)]
