"""Coloured shapes of the papers' sizes, drawn in seconds: for trying out, not for results."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jetflow.data.pieces import image_features

SIZES = (32, 64, 128, 256)
COUNTS = {"train": 256, "test": 64}
CLASSES = (
    "disc", "ring", "square", "frame", "diamond", "triangle", "cross", "saltire", "rows", "columns",
)  # fmt: skip


class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """uint8 [size, size, 3], 10 classes in turn; splits train (256) and test (64)."""

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=str(size), description=f"{size}x{size} pixels.")
        for size in SIZES
    ]

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        assert self.builder_config is not None  # TFDS takes the first config where none is named
        return int(self.builder_config.name)

    def _info(self) -> tfds.core.DatasetInfo:
        features: Any = image_features(self.size, labelled=True)
        features["label"].names = CLASSES
        return tfds.core.DatasetInfo(
            builder=self,
            description="A shape of one colour on a ground that fades into another, with noise. "
            "Example i of a split depends on the split, i and the size alone.",
            features=features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split: str):
        for number in range(COUNTS[split]):
            rng = np.random.default_rng([list(COUNTS).index(split), number, self.size])
            label = number % len(CLASSES)
            yield number, {"image": draw(CLASSES[label], self.size, rng), "label": label}


def draw(shape: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A shape at a random place, of random size and colours: uint8 [size, size, 3]."""
    rows, columns = np.mgrid[:size, :size] / size
    radius = rng.uniform(0.2, 0.4)
    y = (rows - rng.uniform(0.4, 0.6)) / radius
    x = (columns - rng.uniform(0.4, 0.6)) / radius
    colours = rng.uniform(0, 255, (3, 3))
    fade = rows[..., None]
    ground = (1 - fade) * colours[0] + fade * colours[1]
    pixels = np.where(_masks(x, y)[shape][..., None], colours[2], ground)
    noise = rng.normal(0, 4, pixels.shape)
    return np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8)


def _masks(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Where each shape covers the point (x, y), in units of its radius."""
    distance, box, sum_ = np.hypot(x, y), np.maximum(abs(x), abs(y)), abs(x) + abs(y)
    return {
        "disc": distance < 1,
        "ring": abs(distance - 0.8) < 0.2,
        "square": box < 0.9,
        "frame": abs(box - 0.7) < 0.2,
        "diamond": sum_ < 1,
        "triangle": (y < 0.8) & (abs(x) < (y + 1) / 2),
        "cross": (np.minimum(abs(x), abs(y)) < 0.25) & (box < 1),
        "saltire": (abs(abs(x) - abs(y)) < 0.35) & (box < 1),
        "rows": (box < 1) & (np.floor(y * 3) % 2 == 0),
        "columns": (box < 1) & (np.floor(x * 3) % 2 == 0),
    }
