"""A data set written piece by piece, by all cores, such that a kill costs the pieces at hand.

A piece is a run of an archive, decoded and written as ArrayRecord by one process; a note beside
it, written last, says what it was made of. Made again, a data set takes over each piece whose note
fits. The pieces' order and contents depend on the archive alone, not on the number of processes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from jetflow.data import processes
from jetflow.data.images import Unreadable
from jetflow.data.parts import Item, Part
from jetflow.types import UsageError

# Pixels are stored as they are, and not compressed again: on one core, shuffled images of 64x64
# and 256x256 pixels come at 11,800 and 5,400 a second, against 5,200 and 230 with ZLIB and 950 and
# 105 as PNG, which take 0.8 and 0.7, and 0.6 and 0.57 of the bytes (crops of two photographs).
ENCODING = "bytes"
WRITER_OPTIONS = "group_size:1,uncompressed"  # one image a group: read one by one, in any order


def image_features(size: int, labelled: bool) -> tfds.features.FeaturesDict:
    """uint8 [size, size, 3] images; the names of their classes are set when they are known."""
    image = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding=ENCODING)
    label = {"label": tfds.features.ClassLabel()} if labelled else {}
    return tfds.features.FeaturesDict({"image": image, **label})


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One of `share` images goes to the split `name`, chosen by a hash of its file's name.

    Attributes:
        by_path: the hash is of the whole name of the item, with its folders.
        always: an item that is held out whatever its hash.
    """

    name: str
    share: int
    by_path: bool = False
    always: str | None = None

    def holds(self, item: str) -> bool:
        return item == self.always or self.hash(item) % self.share == 0

    def hash(self, item: str) -> int:
        """The first 8 bytes of the SHA-256 of a name, as a big-endian number."""
        name = item if self.by_path else item.rsplit("/", 1)[-1]
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big")

    def at_least_one(self, items: Sequence[str]) -> "HeldOut":
        """The same, but of several items one is held out: if none is, that of the lowest hash."""
        return dataclasses.replace(self, always=min(items, key=self.hash) if items[1:] else None)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one process does at a time.

    Attributes:
        index: its number in the data set.
        split: of its images, but for those that `held_out` takes.
        parts: what it is read from.
        to_pixels: makes an item's content uint8 [size, size, 3], or raises `Unreadable`.
        size: of the images.
        classes: how many there are; None where the records have no label.
        spooled: a file to delete when the piece is written.
    """

    index: int
    split: str
    parts: tuple[Part, ...]
    to_pixels: Callable[[Any], np.ndarray]
    size: int
    classes: int | None
    held_out: HeldOut | None = None
    spooled: Path | None = None

    def fingerprint(self) -> str:
        """Of all that the piece's records depend on."""
        parts = [part.identity() for part in self.parts]
        text = repr((parts, self.split, self.size, self.classes, self.held_out))
        return hashlib.sha256(text.encode()).hexdigest()

    def split_of(self, item: Item) -> str:
        if self.held_out and self.held_out.holds(item.name):
            return self.held_out.name
        return self.split


@dataclasses.dataclass(frozen=True)
class Note:
    """What is known of a piece that is written.

    Attributes:
        splits: of each split in it, (images, bytes of their records).
        unreadable: (name, reason) of what was left out.
    """

    index: int
    fingerprint: str
    splits: dict[str, tuple[int, int]]
    unreadable: list[tuple[str, str]]

    @property
    def images(self) -> int:
        return sum(count for count, _ in self.splits.values())

    @classmethod
    def from_json(cls, text: str) -> "Note":
        fields = json.loads(text)
        splits = {split: (count, size) for split, (count, size) in fields["splits"].items()}
        unreadable = [(name, reason) for name, reason in fields["unreadable"]]
        return cls(fields["index"], fields["fingerprint"], splits, unreadable)


def record_file(folder: Path, index: int, split: str) -> Path:
    return folder / f"{index:06d}-{split}.array_record"


def _note_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"


def read_note(folder: Path, piece: Piece) -> Note | None:
    """The note of a piece, if it is whole and was made of the same."""
    with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):  # there is none, or half
        note = Note.from_json(_note_file(folder, piece.index).read_text("utf-8"))
        if note.fingerprint != piece.fingerprint():
            return None
        for split, (count, _) in note.splits.items():
            reader = ArrayRecordReader(os.fspath(record_file(folder, piece.index, split)))
            if reader.num_records() != count:
                return None
        return note
    return None


def write_piece(folder: Path, piece: Piece) -> Note:
    """Decode the images of a piece and write its records, then its note."""
    features: Any = image_features(piece.size, piece.classes is not None)
    if piece.classes is not None:
        features["label"].names = [str(label) for label in range(piece.classes)]
    serializer = ExampleSerializer(features.get_serialized_info())
    writers: dict[str, ArrayRecordWriter] = {}
    splits, unreadable = {}, []
    for split, example in _examples(piece, unreadable):
        if split not in writers:
            path = _unfinished(record_file(folder, piece.index, split))
            writers[split] = ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)
        proto = serializer.get_tf_example(features.encode_example(example))
        record = proto.SerializeToString(deterministic=True)  # its map has an order by chance
        writers[split].write(record)
        count, size = splits.get(split, (0, 0))
        splits[split] = count + 1, size + len(record)
    for split, writer in writers.items():
        writer.close()
        path = record_file(folder, piece.index, split)
        os.replace(_unfinished(path), path)
    note = Note(piece.index, piece.fingerprint(), splits, unreadable)
    path = _note_file(folder, piece.index)
    _unfinished(path).write_text(json.dumps(dataclasses.asdict(note)), "utf-8")
    os.replace(_unfinished(path), path)
    return note


def _examples(
    piece: Piece, unreadable: list[tuple[str, str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images of a piece, each with its split; what is none goes to `unreadable`."""
    for item in (item for part in piece.parts for item in part.read()):
        try:
            if isinstance(item.content, Unreadable):
                raise item.content
            example: dict[str, Any] = {"image": piece.to_pixels(item.content)}
        except Unreadable as reason:
            unreadable.append((item.name, str(reason)))
            continue
        if piece.classes is not None:
            example["label"] = item.label
        yield piece.split_of(item), example


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


def write_all(folder: Path, pieces: Iterable[Piece], workers: int) -> Iterator[tuple[Piece, Note]]:
    """Write the pieces that are not there yet; gives all of them, in order.

    Args:
        workers: processes; a single one is this one.

    Raises:
        UsageError: if a process is killed, for want of memory say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.unfinished"):
        leftover.unlink()
    if workers == 1:
        for piece in pieces:
            yield _result(piece, read_note(folder, piece) or write_piece(folder, piece))
        return
    ahead: collections.deque[tuple[Piece, Note | Future[Note]]] = collections.deque()
    with _pool(workers) as pool:
        for piece in pieces:
            note = read_note(folder, piece)
            # Ctrl-C is this process's to answer, when the other has started.
            with processes.later_interrupt(), processes.blocked_signals():
                ahead.append((piece, note or pool.submit(write_piece, folder, piece)))
            if len(ahead) > 2 * workers:  # enough that nobody waits, and that spools stay few
                yield _result(*ahead.popleft())
        while ahead:
            yield _result(*ahead.popleft())


def _result(piece: Piece, note: Note | Future[Note]) -> tuple[Piece, Note]:
    try:
        note = note if isinstance(note, Note) else note.result()
    except (BrokenProcessPool, MemoryError) as error:
        how = "was killed, perhaps" if isinstance(error, BrokenProcessPool) else "stopped"
        raise UsageError(
            f"a process that decodes images {how} for want of memory; run the same command again, "
            "with a lower --workers: what is finished is kept"
        ) from error
    if piece.spooled:
        piece.spooled.unlink(missing_ok=True)
    return piece, note


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are started afresh, and end with this one however it ends."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # the parent has threads, of JAX say
    start = processes.end_with_parent
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start)
    try:
        yield pool
    except BaseException:  # Ctrl-C too: not to wait for pieces that are begun
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # they do not hear SIGTERM
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
