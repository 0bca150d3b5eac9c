"""The pieces of a data set made the shards that TFDS reads."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jetflow.data.pieces import WRITER_OPTIONS, Note, record_file


def make(
    folder: Path, notes: Sequence[Note], split: str, template: Any, least: int
) -> tfds.core.SplitInfo:
    """Write the shards of a split, from pieces in a folder that stay there.

    Args:
        template: of the shards' file names, as TFDS makes it.
        least: images in a shard: neighbouring pieces that have fewer are joined.
    """
    groups = _groups([note for note in notes if split in note.splits], split, least)
    for number, group in enumerate(groups):
        target = template.sharded_filepath(shard_index=number, num_shards=len(groups))
        _join([record_file(folder, note.index, split) for note in group], Path(target))
    sizes = [[note.splits[split] for note in group] for group in groups]
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[sum(count for count, _ in group) for group in sizes],
        num_bytes=sum(size for group in sizes for _, size in group),
        filename_template=template,
    )


def read_records(path: Path) -> Iterator[bytes]:
    """The records of an ArrayRecord file, in order, some at a time."""
    reader = ArrayRecordReader(os.fspath(path))
    for start in range(0, reader.num_records(), 256):
        yield from reader.read(range(start, min(start + 256, reader.num_records())))
    reader.close()


def _groups(notes: Sequence[Note], split: str, least: int) -> list[list[Note]]:
    groups: list[list[Note]] = [[]]
    images = 0
    for note in notes:
        if images >= least:
            groups.append([])
            images = 0
        groups[-1].append(note)
        images += note.splits[split][0]
    return groups


def _join(paths: Sequence[Path], target: Path) -> None:
    """One record file of some; a single one is linked, so that it is there still after a kill."""
    if len(paths) == 1:
        try:
            os.link(paths[0], target)
        except OSError:  # file systems without links
            shutil.copyfile(paths[0], target)
        return
    writer = ArrayRecordWriter(os.fspath(target), WRITER_OPTIONS)
    for path in paths:
        for record in read_records(path):
            writer.write(record)
    writer.close()
