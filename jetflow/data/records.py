"""The examples of a data set as TFDS stores them: ArrayRecord files of protocol buffers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

_MESSAGES: Any = tf_example_pb2  # which makes its classes at import: no type checker sees them


class Examples:
    """Random access to images and labels: what TFDS's own data source gives, in less time.

    That one goes through all that a feature could be, for each example anew, which for small images
    takes longer than to read them.
    """

    def __init__(self, records: Any, features: tfds.features.FeaturesDict):
        """
        Args:
            records: random access to the stored bytes, with `__getitems__`.
            features: an image that is stored as a string, and perhaps a label.
        """
        self._records = records
        self._features = features

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [H, W, C], "label"?: int} of an example."""
        return decode(self._records[index], self._features)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Of several at once, whose bytes are read in parallel."""
        records = self._records.__getitems__(indices) if indices else []
        return [decode(record, self._features) for record in records]


def decode(record: bytes, features: Any) -> dict[str, Any]:
    """{"image": uint8 [H, W, C], "label"?: int} of an example as it is stored."""
    stored = _MESSAGES.Example.FromString(record).features.feature
    image = features["image"].decode_example_np(stored["image"].bytes_list.value[0])
    label = {"label": stored["label"].int64_list.value[0]} if "label" in features else {}
    return {"image": image, **label}


def update_checksum(digest: Any, image: np.ndarray, label: Any) -> None:
    """Add an image's pixels and, where there are labels, its label to a SHA-256."""
    digest.update(image.tobytes())
    if label is not None:
        digest.update(np.int32(label).astype("<i4").tobytes())
