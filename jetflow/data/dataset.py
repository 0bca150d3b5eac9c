"""From a data set's name to batches: prepared data is read by TFDS, and ordered by Grain.

The order of the data has no state: train batch k holds the rows [k·B, (k+1)·B) of a stream that the
seed alone fixes, and each process reads those of them that lie on its devices. So a run resumes
exactly from its step number, on any number of processes.
"""

import dataclasses
import functools
import hashlib
import os
import resource
import sys
import weakref
from collections.abc import Generator
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from jetflow import hosts, rollcall
from jetflow.buckets import AnyPath, is_bucket
from jetflow.data import reading, shards, sources
from jetflow.data.builder import UNREADABLE, Preparation, PrepareOptions, is_prepared
from jetflow.data.cache import Copy
from jetflow.data.shards import Records, opened
from jetflow.data.source import entries
from jetflow.options import DataOptions, default_archives, expanded
from jetflow.types import NO_LABEL, Batch, Shape, Standard, UsageError, is_arrays

VERSION = "1.0.0"

# Few threads: for small images Python's lock is the limit, and Grain's default of 16 threads reads
# photos/16 a third slower than two do (15,000 images a second against 20,000, on two cores).
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # the buffer: batches


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a prepared data set.

    Attributes:
        name: as in `config.data.name`: "digits", "photos/16".
        version: of the data, as TFDS counts it: "1.0.0".
        split: as TFDS writes it: "train", "train[:90%]".
        image_shape: (H, W, C), or of arrays (T, D).
        num_classes: 0 where the images have no labels.
        source: random access: len(source), source[i] -> {"image": uint8 [H, W, C], "label"?: int};
            of arrays, float32 [T, D].
        resize: how the images came to their size.
        known_checksum: what `checksum` gives, where it was taken when the data was prepared.
        origin: the paths of the archives that it was prepared from; "" without any.
        copied: bytes that came from a bucket to this machine when it was loaded.
        standard: of arrays, the mean and the standard deviation of each feature in training.
    """

    name: str
    version: str
    split: str
    image_shape: Shape
    num_classes: int
    source: Any = dataclasses.field(repr=False)
    resize: str = "none"
    known_checksum: str | None = None
    origin: str = ""
    copied: int = 0
    standard: Standard | None = None

    @property
    def dtype(self) -> np.dtype:
        return entries(self.image_shape)

    def __len__(self) -> int:
        return len(self.source)

    def checksum(self) -> str:
        """The first 16 hex digits of the SHA-256 over all images and labels, in index order.

        Image for image, its pixels (uint8, row by row) and then, where there are labels, the label
        (int32, little-endian). Reads the whole split the first time, if it is not known already.
        """
        return self.known_checksum or self._checksum

    @functools.cached_property
    def _checksum(self) -> str:
        digest = hashlib.sha256()
        for batch in eval_batches(self, batch_size=256):
            for image, label, index in zip(*batch, strict=True):
                if index >= 0:
                    label = int(label) if self.num_classes else None
                    shards.update_checksum(digest, image.tobytes(), label)
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """All that a result depends on in its data, to stand beside every number."""
        return {
            "name": self.name,
            "version": self.version,
            "split": self.split,
            "examples": len(self),
            "resize": self.resize,
            "checksum": self.checksum(),
        }

    def describe(self) -> str:
        """One line: "digits 1.0.0 train: 1,500 images of 8x8x1, 10 classes"."""
        shape = "x".join(map(str, self.image_shape))
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        data = f"{self.name} {self.version} {self.split}"
        origin = f", from {self.origin}" if self.origin else ""
        kind = "arrays" if is_arrays(self.image_shape) else "images"
        return f"{data}: {len(self):,} {kind} of {shape}, {classes}{origin}"


def load(name: str, split: str, **fields: Any) -> Dataset:
    """A split of a data set, which is prepared first where that takes no archives.

    Several processes may call this at once. Of data in a bucket, the shards of the split are copied
    to this machine first, where they are not there yet.

    Args:
        name: of a data set, with its size where it has some: "digits", "photos/16".
        split: "train", "test", or a part as TFDS writes it: "train[:90%]".
        fields: of `DataOptions`, such as data_dir="gs://bucket/data".

    Raises:
        UsageError: unknown name or split, or data that is damaged, or not there and cannot be
            prepared; or the machine has no room for its copy.
    """
    options = DataOptions(**fields)
    data_dir, copy = options.root, None
    folder, ready = data_dir / name / VERSION, functools.partial(_make_ready, name, data_dir)
    rollcall.reach(f"looking for the data set {name}")
    hosts.by_first(ready)
    rollcall.reach(f"loading the data set {name}")
    ready()  # on a disk of one's own
    if is_bucket(folder) and options.data_cache_gb != 0:
        copy = Copy(name, folder, options)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Every shard stays open, and the whole of ImageNet has thousands of them.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2**16)), hard))
    builder = opened(name, copy.folder if copy else folder, checked=not is_bucket(folder))
    stored = _stored(name, builder, split)
    files = builder.info.splits[split].file_instructions
    features = builder.info.features
    metadata = builder.info.metadata or {}
    source = Records(name, stored, features, files)
    if copy:
        names = (os.path.basename(file.filename) for file in files)
        copy.fetch({name: metadata["files"][name] for name in names})
        weakref.finalize(source, copy.close)
    sums = {info.name: info.num_examples for info in builder.info.splits.values()}
    sums |= metadata.get("checksums", {})
    hosts.compare({f"the checksum of {name} {part}": sum for part, sum in sums.items()})
    return Dataset(
        name=name,
        version=str(builder.version),
        split=split,
        image_shape=features["image"].shape,
        num_classes=features["label"].num_classes if "label" in features else 0,
        source=source,
        resize=metadata.get("resize", "none"),
        known_checksum=metadata.get("checksums", {}).get(split),
        origin=metadata.get("origin", ""),
        copied=copy.copied if copy else 0,
        standard=metadata.get("standard"),
    )


def _make_ready(name: str, data_dir: AnyPath) -> None:
    """Prepare a data set that takes no archives, if it is not there."""
    source, folder, manual_dir = (
        sources.find(name),
        data_dir / name / VERSION,
        default_archives(data_dir),
    )
    if not is_prepared(folder):
        if source.archives:
            raise UsageError(
                f"data set {name!r} was not found in {folder}; prepare it once with `jetflow "
                f"prepare {name} --manual_dir DIR`: {source.needs(manual_dir)}"
            )
        print(f"preparing data set {name} in {folder} (once)", file=sys.stderr, flush=True)
        Preparation(source, folder, manual_dir).run()


def _stored(name: str, builder: Any, split: str) -> Any:
    """TFDS's data source of a split's stored bytes."""
    try:
        stored = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        if not len(stored):
            raise ValueError("no examples")
    except ValueError as error:  # what TFDS raises for unknown, malformed and empty splits
        counts = ", ".join(f"{s.name} ({s.num_examples:,})" for s in builder.info.splits.values())
        raise UsageError(
            f"{split!r} is not a split of data set {name!r} with examples in it; it has {counts} "
            "and parts of these, such as 'train[:90%]'"
        ) from error
    return stored


class Prepared(NamedTuple):
    """A data set that is ready to be read.

    Attributes:
        folder: its own.
        splits: all that it has.
        unreadable: a line for each file that was left out, with its name and the reason; as in
            `folder`/unreadable.tsv.
        differences: a line for each split whose number of images is not the published one.
    """

    folder: AnyPath
    splits: dict[str, Dataset]
    unreadable: list[str]
    differences: list[str]


def prepare(name: str, **fields: Any) -> Prepared:
    """Prepare a data set, from archives where it needs some; goes on where a kill stopped it.

    Args:
        fields: of `PrepareOptions`, such as manual_dir="~/archives".

    Raises:
        UsageError: unknown name, archives that are missing, or others than those that the data was
            prepared from, no space or no rights.
    """
    options = PrepareOptions(**fields)
    data_dir = options.root
    source, folder = sources.find(name), data_dir / name / VERSION
    manual_dir = default_archives(data_dir)
    if options.manual_dir:
        manual_dir = expanded("manual_dir", options.manual_dir).absolute()
    if options.overwrite or not is_prepared(folder) or source.is_in(manual_dir):
        Preparation(source, folder, manual_dir, options).run()
    infos = opened(name, folder, checked=not is_bucket(folder)).info.splits
    splits = {split: load(name, split, data_dir=data_dir, data_cache_gb=0.0) for split in infos}
    counts = {split: len(dataset) for split, dataset in splits.items()}
    file = folder / UNREADABLE
    lines = file.read_bytes().decode("utf-8", "replace") if file.exists() else ""
    unreadable = lines.splitlines()
    return Prepared(folder, splits, unreadable, source.differences(counts, len(unreadable)))


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Int[np.ndarray, "R"] | None = None,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """The batches start_step, start_step + 1, … of an endless stream, shuffled anew each epoch.

    Args:
        dataset: may be smaller than a batch, which then holds rows of several epochs.
        batch_size: B, of the whole batch over all processes.
        seed: any non-negative integer; with the data set's length it fixes the order.
        start_step: number of the first batch; costs nothing, whatever it is.
        rows: which of the B rows are read: those of this process's devices; default: all.
        workers: processes that read, or 0 for threads of this one; the batches do not depend on it.

    Returns:
        Numpy batches of R rows; to close the generator, or to drop it, ends its threads or
        processes.
    """
    # Grain shuffles epoch e by seed + e, so the seeds 0 and 1 would share all epochs but one.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    indices = grain.MapDataset.range(len(dataset)).shuffle(seed=shuffle_seed).repeat()
    return _read_all(dataset, indices.batch(batch_size)[start_step:], rows, workers)


def eval_batches(
    dataset: Dataset, *, batch_size: int, rows: Int[np.ndarray, "R"] | None = None
) -> Generator[Batch, None, None]:
    """Every example once, in index order; the last batch is filled up with padding rows.

    A padding row has a black image, `NO_LABEL` and index -1. All processes get the same number of
    batches, so one may hold padding only. Arguments and result as for `train_batches`; no worker
    processes, which take longer to start than most evaluations take to read.
    """
    padded_length = -(-len(dataset) // batch_size) * batch_size
    return _read_all(dataset, grain.MapDataset.range(padded_length).batch(batch_size), rows)


def _read_all(
    dataset: Dataset, positions, rows: Int[np.ndarray, "R"] | None, workers: int = 0
) -> Generator[Batch, None, None]:
    """The batches whose examples are at `positions`, a Grain data set of int [B]."""
    read = functools.partial(_read, dataset, rows)
    batches = positions.map(read).to_iter_dataset(_READ_OPTIONS)
    yield from reading.read_by_workers(batches, workers) if workers else batches


def _read(dataset: Dataset, rows: Int[np.ndarray, "R"] | None, positions: np.ndarray) -> Batch:
    """The examples at `positions[rows]`; positions past the end become padding rows."""
    positions = positions if rows is None else positions[rows]
    existing = [int(position) for position in positions if position < len(dataset)]
    # One call for all of them where the source can: it halves the time for small images.
    read_many = getattr(dataset.source, "__getitems__", None)
    examples = read_many(existing) if read_many else [dataset.source[i] for i in existing]

    image = np.zeros((len(positions), *dataset.image_shape), dataset.dtype)
    label = np.full(len(positions), NO_LABEL, np.int32)
    index = np.full(len(positions), -1, np.int32)
    for row, example in enumerate(examples):
        image[row] = example["image"]
        if dataset.num_classes:
            label[row] = example["label"]
    index[: len(existing)] = existing
    return Batch(image, label, index)
