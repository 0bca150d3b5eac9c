"""CIFAR-10, from the Python version of its archive, in the order of its batches.

A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from collections.abc import Sequence
from pathlib import Path

from jetflow.data.archives import batches
from jetflow.data.source import Archive, Contents, Source

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _contents(paths: Sequence[Path], notes: Path, max_pixels: int) -> Contents:
    train = batches(paths, r"data_batch_(\d)", range(1, 6), image_size=32, first_label=0)
    test = batches(paths, r"test_batch()", [0], image_size=32, first_label=0)
    return Contents(CLASSES, {"train": train, "test": test})


SOURCES = (
    Source(
        name="cifar10",
        image_shape=(32, 32, 3),
        contents=_contents,
        about=__doc__,
        splits={"train": 50_000, "test": 10_000},
        num_classes=10,
        archives=(Archive("cifar-10-python.tar.gz", 170_498_071, ("cifar-10-batches-py",)),),
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        resize="none (pixels as published)",
    ),
)
