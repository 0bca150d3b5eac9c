"""The sizes of the papers' data sets: enough to plan a training on them without the images.

Of prepared data, `pipeline.load` knows the very numbers.
"""

import dataclasses
from collections.abc import Mapping

import tensorflow_datasets as tfds

from jetflow.types import UsageError


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a data set.

    Attributes:
        image_shape: (H, W, C).
        num_classes: 0 where the images have no labels.
        splits: images in each.
        hashed: whether a hash of their names divides the images, so that only their sum is known.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    splits: dict[str, int]
    hashed: bool = False

    def examples(self, split: str) -> int:
        """Images in a split, or in a part of one as TFDS writes it.

        Raises:
            UsageError: if there is no such split.
        """
        infos = {
            name: tfds.core.SplitInfo(
                name=name, shard_lengths=[count], num_bytes=0, filename_template=None
            )
            for name, count in self.splits.items()
        }
        try:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (AssertionError, KeyError, ValueError) as error:
            counts = ", ".join(f"{name} ({count:,})" for name, count in self.splits.items())
            raise UsageError(f"{split!r} is no split of this data set; it has {counts}") from error
        spans = [(part.from_ or 0, part.to or self.splits[part.splitname]) for part in parts]
        return sum(end - start for start, end in spans)


def differences(name: str, splits: Mapping[str, int], unreadable: int = 0) -> list[str]:
    """A line for each split whose number of images is not the published one, where that is known.

    Args:
        splits: images in each, of the data set as it was prepared.
        unreadable: images that were left out then, and may lack in any of them.
    """
    if name not in FACTS:
        return []
    published = FACTS[name].splits
    found = {split: splits.get(split, 0) for split in published}
    if FACTS[name].hashed:
        whole = "+".join(published)
        found, published = {whole: sum(found.values())}, {whole: sum(published.values())}
    return [
        f"{name} {split}: {found[split]:,} images, but {count:,} were published; is the archive "
        "whole?"
        for split, count in published.items()
        if not 0 <= count - found[split] <= unreadable
    ]


_OLD = {"train": 1_281_149, "validation": 49_999}
_IMAGENET = {"train": 1_281_167, "validation": 50_000}
# Of 13,153,500 images in 19,167 classes; a hash holds out about one of 256.
_WINTER21 = {"train": 13_102_119, "validation": 51_381}
# Of 14,197,122 images in 21,841 classes.
_FALL11 = {"train": 14_141_664, "validation": 55_458}


def _at_sizes(
    name: str, sizes: tuple[int, ...], classes: int, splits: dict[str, int], hashed: bool = False
) -> dict[str, Facts]:
    return {f"{name}/{size}": Facts((size, size, 3), classes, splits, hashed) for size in sizes}


FACTS = {
    "cifar10": Facts((32, 32, 3), 10, {"train": 50_000, "test": 10_000}),
    # van den Oord et al., arXiv 1601.06759: the copy that Jet's paper trains on
    "imagenet32_old": Facts((32, 32, 3), 0, _OLD),
    "imagenet64_old": Facts((64, 64, 3), 0, _OLD),
    # Chrabaszcz et al., arXiv 1707.08819: box resize, with labels
    "imagenet32_new": Facts((32, 32, 3), 1000, _IMAGENET),
    "imagenet64_new": Facts((64, 64, 3), 1000, _IMAGENET),
    # Russakovsky et al., arXiv 1409.0575: ILSVRC 2012, and all of ImageNet
    **_at_sizes("imagenet1k", (64, 128, 256), 1000, _IMAGENET),
    **_at_sizes("imagenet21k", (32, 64), 19_167, _WINTER21, hashed=True),
    **_at_sizes("imagenet21k_fall11", (32, 64), 21_841, _FALL11, hashed=True),
    # Choi et al., arXiv 1912.01865
    **_at_sizes("afhq", (64, 128, 256), 3, {"train": 14_630, "validation": 1_500}),
    **_at_sizes("afhq_v2", (64, 128, 256), 3, {"train": 14_336, "test": 1_467}),
}
