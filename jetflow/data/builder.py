"""Archives to a TFDS data set of ArrayRecord shards.

Threads decode the images: Pillow does so outside of Python's lock. Each shard is written beside its
place and then renamed. Prepared again after a kill, a data set keeps the shards that are whole.
Until all is done, its folder is called `….partial`. Order and bytes do not depend on the number of
threads.
"""

import collections
import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from jetflow import hosts
from jetflow.data.archives import DAMAGE
from jetflow.data.images import MAX_PIXELS, Unreadable, large_files
from jetflow.data.shards import (
    Record,
    Shard,
    decode,
    encode,
    one_line,
    read_shard,
    update_checksum,
)
from jetflow.data.source import Contents, File, Image, Member, Source, name_hash, tree
from jetflow.files import write_atomically
from jetflow.types import NO_LABEL, UsageError

A = TypeVar("A")
B = TypeVar("B")

UNREADABLE = "unreadable.tsv"  # name and reason of each image that was left out
ORIGIN = "origin.tsv"  # name, bytes and time of each file of the archives

# What a kill may cost: some 5,000 photographs.
SHARD_BYTES, SHARD_MEMBERS = 512 * 2**20, 4096

Counts = dict[str, int]  # images of each split, in one shard


def is_prepared(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists()


def make(
    source: Source,
    folder: Path,
    manual_dir: Path,
    *,
    threads: int,
    max_pixels: int = MAX_PIXELS,
    leave_out: bool = False,
    overwrite: bool = False,
) -> None:
    """Prepare a data set in `folder`, unless that is done; waits for another process that does so.

    Args:
        manual_dir: has the archives.
        threads: that decode.
        max_pixels: an image that has more is left out.
        leave_out: go on without folders of images that belong to no split or class.
        overwrite: prepare it although it is there.

    Raises:
        UsageError: archives are missing or damaged, or others than those that it was prepared
            from; or `folder` cannot be written.
    """
    paths = source.paths(manual_dir)
    origin = _origin(paths)
    if is_prepared(folder) and not overwrite:
        _check_origin(source, folder, manual_dir, origin)
        return
    try:
        if folder.exists() and not is_prepared(folder):
            raise FileExistsError("the directory exists, but holds no complete data set: delete it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), source.name), large_files():
            if overwrite or not is_prepared(folder):  # else another process was first
                # What needs no archive has nothing to go on with, and so a folder for each process:
                # on a disk without locks several may be here.
                own = "" if source.archives else f".{secrets.token_hex(4)}"
                partial = folder.with_name(f"{folder.name}.partial{own}")
                try:
                    _begin(partial, origin)
                    pixels = functools.partial(source.pixels, max_pixels=max_pixels)
                    _make(source, paths, partial, pixels, threads, leave_out)
                    if overwrite:
                        shutil.rmtree(folder, ignore_errors=True)
                    partial.rename(folder)
                finally:
                    if own:
                        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if overwrite or not is_prepared(folder):  # else, without locks, another process was first
            raise UsageError(
                f"data set {source.name!r} cannot be prepared in {folder} ({error}); make room "
                "and make it writable, and run the same command again, which keeps what is "
                "finished, or set --data_dir or TFDS_DATA_DIR to another directory"
            ) from error


@contextlib.contextmanager
def _locked(lock: Path, name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(hosts.locked(lock, wait=False)):
            print(f"another process prepares {name}; waiting", file=sys.stderr, flush=True)
            stack.enter_context(hosts.locked(lock, wait=True))
        yield


def _origin(paths: Sequence[Path]) -> str:
    """A line for each file of the archives: name, bytes and time."""
    files = []
    for path in paths:
        state = path.stat()
        inner = tree(path) if path.is_dir() else [File("", state.st_size, state.st_mtime_ns)]
        files += [(one_line(str(path / file.name)), *file[1:]) for file in inner]
    root = f"{paths[0].parent}/" if paths else ""  # which may be moved
    lines = ("\t".join(map(str, (name.removeprefix(root), *rest))) for name, *rest in files)
    return "".join(f"{line}\n" for line in lines)


def _check_origin(source: Source, folder: Path, manual_dir: Path, origin: str) -> None:
    record = folder / ORIGIN
    before = record.read_text("utf-8") if record.exists() else origin
    if changed := set(before.splitlines()) ^ set(origin.splitlines()):
        names = sorted({line.split("\t")[0] for line in changed})
        raise UsageError(
            f"{source.name} was prepared in {folder} from other files than those in {manual_dir} "
            f"now: {len(names):,} are new, gone or changed, {names[0]!r} for one; give --overwrite "
            "to prepare it anew, or another --data_dir"
        )


def _begin(partial: Path, origin: str) -> None:
    """Remove what an earlier start made of other archives, and what a kill left half done."""
    record = partial / ORIGIN
    if record.exists() and record.read_text("utf-8") != origin:
        print(f"{partial} was begun with other archives; starting anew", file=sys.stderr)
        shutil.rmtree(partial)
    (partial / "notes").mkdir(parents=True, exist_ok=True)
    for path in partial.glob("*.incomplete"):
        path.unlink()
    with write_atomically(record) as file:
        file.write(origin.encode())


def _make(
    source: Source,
    paths: Sequence[Path],
    folder: Path,
    pixels: Callable[[Image], np.ndarray],
    threads: int,
    leave_out: bool,
) -> None:
    for archive, path in zip(source.archives, paths, strict=True):
        size = path.stat().st_size
        if path.name == archive.name and isinstance(archive.size, int) and size != archive.size:
            text = f"{path} has {size:,} bytes; the published file has {archive.size:,}"
            print(text, file=sys.stderr)
    place = " and ".join(map(str, paths))
    try:
        contents = source.contents(paths, folder / "notes")
        _check_left_out(contents, leave_out)
        shards = _shards(source, contents, folder)
        record = functools.partial(_record, source, bool(contents.classes), pixels)
        all_counts, checksums = _write(source, record, shards, threads)
    except DAMAGE as error:
        raise UsageError(
            f"an archive of {source.name} is damaged, or not what its name says: {place} "
            f"({error}); bring it again, and run the same command"
        ) from error
    except MemoryError as error:
        raise UsageError(
            "not enough memory to decode; run the same command again, which keeps what is "
            "finished, with a lower --workers or --max_pixels"
        ) from error
    left_out = "".join(shard.note.read_text("utf-8") for shard in shards)
    for split in ("train", *(split for split in source.splits if contents.splits.get(split))):
        if not any(counts.get(split) for counts in all_counts):
            lines = left_out.splitlines()
            first = f"; left out were {len(lines):,} files, first {lines[0]!r}" if lines else ""
            raise UsageError(f"{place} has not one readable image for split {split}{first}")
    (folder / UNREADABLE).write_text(left_out, "utf-8")
    _write_metadata(
        source, contents, all_counts, folder, origin=one_line(place), checksums=checksums
    )
    shutil.rmtree(folder / "notes")


def _check_left_out(contents: Contents, leave_out: bool) -> None:
    if contents.left_out:
        folders = ", ".join(f"{path} ({n:,} images)" for path, n in contents.left_out.items())
        text = f"of no split, or of no class in train: {folders}"
        if not leave_out:
            raise UsageError(f"{text}; move or rename them, or give --leave_out to go on without")
        print(f"left out, as {text}", file=sys.stderr)


def _shards(source: Source, contents: Contents, folder: Path) -> list[Shard]:
    """All shards, in order, with their files in `folder`."""
    shards = []
    for split, members in contents.splits.items():
        groups = list(_groups(members))
        templates = {
            each: _template(source, folder, each)
            for each in (contents.splits if source.held_out else (split,))
        }
        for number, group in enumerate(groups):
            files = {
                each: Path(template.sharded_filepath(shard_index=number, num_shards=len(groups)))
                for each, template in templates.items()
            }
            shards.append(Shard(group, split, files, folder / "notes" / f"{split}-{number:06d}"))
    return shards


def _groups(members: Sequence[Member]) -> Iterator[tuple[Member, ...]]:
    """Neighbours together, up to `SHARD_BYTES` and up to `SHARD_MEMBERS` of them."""
    group: list[Member] = []
    size = 0
    for member in members:
        if group and (size + member.size > SHARD_BYTES or len(group) == SHARD_MEMBERS):
            yield tuple(group)
            group, size = [], 0
        group.append(member)
        size += member.size
    if group:
        yield tuple(group)


def _template(source: Source, folder: Path, split: str) -> tfds.core.ShardedFileTemplate:
    name = source.name.split("/")[0]
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
    )


def _record(
    source: Source, is_labelled: bool, pixels: Callable[[Image], np.ndarray], image: Image
) -> Record:
    try:
        content = encode(pixels(image), image.label if is_labelled else None)
        if is_labelled and image.label == NO_LABEL:
            raise Unreadable("a sound image, but of no class")
    except Unreadable as reason:
        return Record(False, b"", f"{one_line(image.name)}\t{one_line(str(reason))}")
    name = image.name.split("/")[-1]
    return Record(source.held_out > 0 and name_hash(name) % source.held_out == 0, content)


def _write(
    source: Source, record: Callable[[Image], Record], shards: Sequence[Shard], threads: int
) -> tuple[list[Counts], dict[str, str]]:
    """Write every shard that is not there yet; what each holds, and the splits' checksums."""
    digests = {split: hashlib.sha256() for shard in shards for split in shard.files}
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of a log
    total = sum(shard.size for shard in shards)
    all_counts, images, left_out = [], 0, 0
    with (
        tqdm(
            total=total, desc=source.name, unit="B", unit_scale=True, mininterval=interval,
            disable=not source.archives,
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):  # fmt: skip
        for shard in shards:
            if not (counts := shard.counts()):
                inside = (image for member in shard.members for image in member.images)
                shard.write(_mapped(record, inside, pool, ahead=4 * threads))
                counts = shard.counts() or {}
            all_counts.append(counts)
            for split, file in shard.files.items():
                for content in read_shard(file):
                    update_checksum(digests[split], *decode(content))
            images += sum(counts.values())
            left_out += shard.note.read_text("utf-8").count("\n")
            bar.set_postfix_str(f"{images:,} images, {left_out:,} unreadable", refresh=False)
            bar.update(shard.size)
    return all_counts, {split: each.hexdigest()[:16] for split, each in digests.items()}


def _mapped(
    function: Callable[[A], B], items: Iterable[A], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[B]:
    """`function(item)` of all items, in order; so many are under way at once."""
    coming: collections.deque[Future[B]] = collections.deque()
    for item in items:
        coming.append(pool.submit(function, item))
        if len(coming) > ahead:
            yield coming.popleft().result()
    for future in coming:
        yield future.result()


def _write_metadata(
    source: Source, contents: Contents, all_counts: Sequence[Counts], folder: Path, **facts
) -> None:
    """What TFDS needs to read the shards, and `load` to check them."""
    image = tfds.features.Tensor(shape=source.image_shape, dtype=np.uint8, encoding="bytes")
    classes = [one_line(name) for name in contents.classes]
    label = {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    name, _, config = source.name.partition("/")
    version = tfds.core.Version(folder.name.split(".partial")[0])
    identity = tfds.core.DatasetIdentity(name, version, os.fspath(folder), "", config or None)
    files = {file.name: file.stat().st_size for file in sorted(folder.glob("*.array_record-*"))}
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=source.about,
        features=tfds.features.FeaturesDict({"image": image, **label}),
        supervised_keys=("image", "label") if label else None,
        homepage=source.homepage,
        metadata=tfds.core.MetadataDict(resize=source.resize_method, files=files, **facts),
        disable_shuffling=True,  # the order of the archive is the order on disk
    )
    info.set_file_format("array_record")
    infos = []
    for split in facts["checksums"]:
        lengths = [counts[split] for counts in all_counts if split in counts]
        sizes = [size for name, size in files.items() if f"-{split}.array_record" in name]
        if sum(lengths):
            template = _template(source, folder, split)
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=sum(sizes),
                    filename_template=template,
                )
            )  # fmt: skip
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)
