"""Prepared data as TFDS has it, written and read: shards, metadata, records.

A shard has the images of a part of a split, decoded: an ArrayRecord file of `tf.train.Example`s.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from jetflow.buckets import AnyPath, is_bucket, raise_refusal
from jetflow.data.source import Contents, Source, entries
from jetflow.files import naming, read_json, write_atomically
from jetflow.types import UsageError

_OPTIONS = "group_size:1,uncompressed"  # one image a group: read one by one, in any order
_Example: Any = vars(tf_example_pb2)["Example"]  # made at import: no type checker sees it


def written(note: Path, files: Mapping[str, Path], digests: dict[str, Any]) -> dict | None:
    """What `write` noted of a shard, and its images added to `digests`; None if it is not whole."""
    sums = {split: digests[split].copy() for split in files}
    with contextlib.suppress(UsageError, RuntimeError, ValueError, IndexError, DecodeError):
        facts = read_json(note)
        if facts.get("bytes") == _bytes(files):
            for split, file in files.items():
                for content in read_shard(file):
                    update_checksum(sums[split], *decode(content))
            digests.update(sums)
            return facts


def _bytes(files: Mapping[str, Path]) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in files.values() if file.exists()}


def write(
    note: Path, files: Mapping[str, Path], records: Iterable[tuple[str, bytes | str]]
) -> None:
    """Write a shard.

    Args:
        note: gets, at the end, the "counts" of records by split, the "bytes" by the name of a file,
            and the lines of images that are "left_out".
        files: an ArrayRecord file for each split that may get some of the records.
        records: of (split, record), or of (split, line) for an image that is left out.

    Raises:
        OSError: there is no room.
    """
    partial = {
        split: file.with_name(f"{file.name}.{os.getpid()}.incomplete")
        for split, file in files.items()
    }
    counts, left_out = dict.fromkeys(partial, 0), []
    with naming(note.parent.parent):
        try:
            writers = {
                split: ArrayRecordWriter(os.fspath(path), _OPTIONS)
                for split, path in partial.items()
            }
            for split, record in records:
                if isinstance(record, str):
                    left_out.append(record)
                else:
                    writers[split].write(record)
                    counts[split] += 1
            for split, writer in writers.items():
                writer.close()
                partial[split].rename(files[split])
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)
    facts = {"counts": counts, "bytes": _bytes(files), "left_out": left_out}
    with write_atomically(note) as file:
        file.write(json.dumps(facts).encode())


def encode(pixels: np.ndarray, label: int | None) -> bytes:
    """An image as TFDS stores it: as it is, and not compressed.

    On one core, shuffled images of 64x64 and 256x256 pixels are read at 11,800 and 5,400 a second,
    against 5,200 and 230 with ZLIB and 950 and 105 as PNG, which take 0.8 and 0.7, and 0.6 and 0.57
    of the bytes (crops of two photographs).
    """
    example = _Example()
    example.features.feature["image"].bytes_list.value.append(pixels.tobytes())
    if label is not None:
        example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString(deterministic=True)  # its map has an order by chance


def decode(record: bytes) -> tuple[bytes, int | None]:
    """The bytes of an image as it is stored, and its label if it has one."""
    features = _Example.FromString(record).features.feature
    label = features["label"].int64_list.value[0] if "label" in features else None
    return features["image"].bytes_list.value[0], label


def read_shard(path: Path) -> Iterator[bytes]:
    """The records of an ArrayRecord file, in order."""
    reader = ArrayRecordReader(os.fspath(path))
    for start in range(0, reader.num_records(), 256):
        yield from reader.read(range(start, min(start + 256, reader.num_records())))
    reader.close()


def update_checksum(digest: Any, pixels: bytes, label: int | None) -> None:
    """Add an image's pixels and, where there are labels, its label to a SHA-256."""
    digest.update(pixels)
    if label is not None:
        digest.update(np.int32(label).astype("<i4").tobytes())


def one_line(name: str) -> str:
    """A name without tabs, line breaks and what is not UTF-8: these are escaped."""
    odd = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
    return odd.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def write_metadata(
    source: Source, contents: Contents, notes: Sequence[dict], folder: Path, **facts
) -> None:
    """What TFDS needs to read the shards, and `load` to check them."""
    method = "short side to {} by a box filter (bicubic where it enlarges), centre crop"
    shape = contents.shape or source.image_shape
    resize = source.resize or method.format(shape[0])
    image = tfds.features.Tensor(shape=shape, dtype=entries(shape), encoding="bytes")
    classes = [one_line(name) for name in contents.classes]
    label = {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    name, _, config = source.name.partition("/")
    version = tfds.core.Version(folder.name.split(".partial")[0])
    identity = tfds.core.DatasetIdentity(name, version, os.fspath(folder), "", config or None)
    files = {name: size for note in notes for name, size in note["bytes"].items()}
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=source.about,
        features=tfds.features.FeaturesDict({"image": image, **label}),
        supervised_keys=("image", "label") if label else None,
        homepage=source.homepage,
        metadata=tfds.core.MetadataDict(
            resize=resize, files=files, standard=contents.standard, **facts
        ),
        disable_shuffling=True,  # the order of the archive is the order on disk
    )
    info.set_file_format("array_record")
    counts = {
        split: [note["counts"][split] for note in notes if split in note["counts"]]
        for split in facts["checksums"]
    }
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=sum(size for name, size in files.items() if f"-{split}.array" in name),
            filename_template=tfds.core.ShardedFileTemplate(
                epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
            ),
        )
        for split, lengths in counts.items()
        if sum(lengths)
    ]
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)


# TFDS's decorators hide its signatures.
def opened(name: str, folder: AnyPath, *, checked: bool = True) -> Any:
    """TFDS's builder of prepared data; `checked`: whose files are there as a whole."""
    try:
        builder: Any = tfds.builder_from_directory(folder)
        sizes = dict(builder.info.metadata or {}).get("files", {})
    except Exception as error:  # TFDS raises nearly any type for files that are no JSON
        if is_bucket(folder):
            raise_refusal(error)
        raise _damaged(name, folder, error) from error
    for file, size in sizes.items() if checked else ():
        path = folder / file
        if not path.exists() or path.stat().st_size != size:
            raise _damaged(name, path, f"not there with {size:,} bytes")
    return builder


def _damaged(name: str, path: str | AnyPath, reason: Exception | str) -> UsageError:
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
        stored, label = decode(record)
        image = {"image": self._features["image"].decode_example_np(stored)}
        return image if label is None else {**image, "label": label}
