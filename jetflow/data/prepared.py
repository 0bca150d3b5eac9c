"""Prepared data, and its records one by one; what is damaged is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jetflow.data import shards
from jetflow.types import UsageError


def opened(name: str, folder: Path) -> Any:  # TFDS's decorators hide its signatures
    """TFDS's builder of prepared data whose files are there as a whole."""
    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS raises nearly any type for files that are no JSON
        raise _damaged(name, folder, error) from error
    for file, size in (builder.info.metadata or {}).get("files", {}).items():
        path = folder / file
        if not path.exists() or path.stat().st_size != size:
            raise _damaged(name, path, f"not there with {size:,} bytes")
    return builder


def _damaged(name: str, path: str | Path, reason: Exception | str) -> UsageError:
    return UsageError(
        f"data set {name!r} is damaged: {path} ({' '.join(str(reason).split())}); prepare it anew "
        f"with `jetflow prepare {name} --overwrite`, and its archives"
    )


class Records:
    """Random access to images and labels: what TFDS's own data source gives, in less time.

    That one goes through all that a feature could be, for each image anew, which for small images
    takes longer than to read them.

    Attributes:
        name: of the data set.
        stored: TFDS's data source of the stored bytes.
        features: an image in any encoding, and perhaps a label.
        files: which examples are in which file, as TFDS has it.
    """

    def __init__(
        self, name: str, stored: Any, features: tfds.features.FeaturesDict, files: Sequence[Any]
    ):
        self._name, self._stored, self._files = name, stored, files
        self._features: Any = features

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [H, W, C], "label"?: int} of an image."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Of several at once, whose bytes are read in parallel.

        Raises:
            UsageError: a file is damaged.
        """
        try:
            records = self._stored.__getitems__(indices) if indices else []
        except RuntimeError as error:  # of ArrayRecord, which does not always name the file
            if len(indices) > 1:
                return [self[index] for index in indices]
            ends = np.cumsum([file.take for file in self._files])
            file = self._files[int(np.searchsorted(ends, indices[0], "right"))].filename
            raise _damaged(self._name, file, error) from error
        return list(map(self._decode, records))

    def _decode(self, record: bytes) -> dict[str, Any]:
        stored, label = shards.decode(record)
        image = {"image": self._features["image"].decode_example_np(stored)}
        return image if label is None else {**image, "label": label}
