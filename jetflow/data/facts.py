"""The sizes of the papers' data sets: enough to plan a training on them without the images."""

import dataclasses

import tensorflow_datasets as tfds

from jetflow.types import UsageError


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a data set.

    Attributes:
        image_shape: (H, W, C).
        num_classes: 0 where the images have no labels.
        splits: images in each.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    splits: dict[str, int]

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


_IMAGENET = {"train": 1_281_167, "validation": 50_000}

FACTS = {
    # van den Oord et al., arXiv 1601.06759: the copy that Jet's paper trains on
    "imagenet64_old": Facts((64, 64, 3), 0, {"train": 1_281_149, "validation": 49_999}),
    # Chrabaszcz et al., arXiv 1707.08819: box resize, with labels
    "imagenet64_new": Facts((64, 64, 3), 1000, _IMAGENET),
    # Russakovsky et al., arXiv 1409.0575: ILSVRC 2012, at 128 pixels
    "imagenet1k/128": Facts((128, 128, 3), 1000, _IMAGENET),
}
