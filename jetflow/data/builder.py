"""Archives to a TFDS data set of ArrayRecord shards, written by all cores.

Each shard is written by one process beside its place and then renamed. Prepared again after a kill,
a data set keeps the shards that are whole. Until all is done, its folder is called `….partial`.
Order and bytes do not depend on the number of processes.
"""

import collections
import contextlib
import functools
import gzip
import hashlib
import multiprocessing
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import cast

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from jetflow import hosts
from jetflow.data import processes
from jetflow.data.archives import DAMAGE, TarMember, is_gzip
from jetflow.data.shards import Shard, decode, one_line, read_shard, update_checksum, write_shard
from jetflow.data.source import Contents, Member, Source
from jetflow.files import FULL, naming
from jetflow.types import UsageError

UNREADABLE = "unreadable.tsv"  # name and reason of each image that was left out

# What a kill may cost a process: some 5,000 photographs, which take half a minute to decode.
SHARD_BYTES, SHARD_MEMBERS = 512 * 2**20, 4096


Counts = dict[str, int]  # images of each split, in one shard


def make(source: Source, folder: Path, manual_dir: Path, workers: int) -> None:
    """Prepare a data set in `folder`, or wait until another process has done so.

    Args:
        manual_dir: has the archives.
        workers: processes that decode; a single one is this one.

    Raises:
        UsageError: archives are missing or damaged, `folder` cannot be written, or a process was
            killed.
    """
    if missing := source.missing(manual_dir):
        remedy = "put them there, or give another --manual_dir"
        raise UsageError(f"data set {source.name!r} lacks archives: {missing}; {remedy}")
    try:
        if folder.exists():
            raise FileExistsError("the directory exists, but holds no complete data set: delete it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(hosts.locked(lock, wait=False)):
                print(
                    f"another process prepares {source.name}; waiting", file=sys.stderr, flush=True
                )
                stack.enter_context(hosts.locked(lock, wait=True))
            if not is_prepared(folder):
                # What needs no archive has nothing to go on with, and so a folder for each process:
                # on a disk without locks several may be here.
                own = "" if source.archives else f".{secrets.token_hex(4)}"
                partial = folder.with_name(f"{folder.name}.partial{own}")
                try:
                    with naming(partial):
                        _make(source, folder, partial, manual_dir, workers)
                finally:
                    if own:
                        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        if not is_prepared(folder):  # else on a disk without locks, another process was first
            raise UsageError(
                f"data set {source.name!r} was not found in {folder} and cannot be prepared there "
                f"({error}); set --data_dir or TFDS_DATA_DIR to a writable directory, or to one "
                "that holds it"
            ) from error


def is_prepared(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists()


def _make(source: Source, folder: Path, partial: Path, manual_dir: Path, workers: int) -> None:
    notes = partial / "notes"
    notes.mkdir(parents=True, exist_ok=True)
    paths = [path for archive in source.archives if (path := archive.find(manual_dir))]
    for archive, path in zip(source.archives, paths, strict=True):
        size = path.stat().st_size
        if path.name == archive.name and isinstance(archive.size, int) and size != archive.size:
            text = f"{path} has {size:,} bytes; the published file has {archive.size:,}"
            print(text, file=sys.stderr)
    try:
        contents = source.contents(paths, notes)
        shards = _shards(source, contents, partial)
        _forget_other_shards(partial, paths, [repr(shard.members) for shard in shards], manual_dir)
        all_counts, checksums = _write(source, bool(contents.classes), shards, workers)
    except DAMAGE as error:
        raise UsageError(
            f"an archive of {source.name} in {manual_dir} is damaged, or not what its name says "
            f"({error}); bring it again, and run the same command"
        ) from error
    left_out = "".join(shard.note.read_text("utf-8") for shard in shards)
    for split in ("train", *(split for split in source.splits if contents.splits.get(split))):
        if not any(counts.get(split) for counts in all_counts):
            lines = left_out.splitlines()
            first = f"; left out were {len(lines):,} files, first {lines[0]!r}" if lines else ""
            raise UsageError(f"{manual_dir} has not one readable image for split {split}{first}")
    (partial / UNREADABLE).write_text(left_out, "utf-8")
    metadata = {"checksums": checksums, "unreadable": left_out.count("\n")}
    _write_metadata(source, contents, all_counts, metadata, partial)
    partial.rename(folder)
    shutil.rmtree(folder / notes.name)


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


def _forget_other_shards(
    folder: Path, paths: Sequence[Path], shards: Sequence[str], manual_dir: Path
) -> None:
    """Remove what an earlier start made of other archives, and what a kill left half done."""
    states = [path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    text = repr((states, shards)).replace(os.fspath(manual_dir), "")  # which may be moved
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    note = folder / "notes" / "archives"
    is_other = note.exists() and note.read_text() != digest
    if is_other:
        print(f"{folder} was begun with other archives; starting anew", file=sys.stderr)
    old = ("[0-9]*.array_record", "*.json", "*.unfinished")  # pieces of version 0.1
    for pattern in ("*.incomplete", "notes/*.tar", *old, *["*.array_record-*"] * is_other):
        for path in folder.glob(pattern):
            path.unlink()
    note.write_text(digest)


def _write(
    source: Source, is_labelled: bool, shards: Sequence[Shard], workers: int
) -> tuple[list[Counts], dict[str, str]]:
    """Write every shard that is not there yet; what each holds, and the splits' checksums."""
    digests = {split: hashlib.sha256() for shard in shards for split in shard.files}
    write = functools.partial(write_shard, source=source, is_labelled=is_labelled)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of a log
    total = sum(shard.size for shard in shards)
    all_counts, images, left_out = [], 0, 0
    with tqdm(
        total=total, desc=source.name, unit="B", unit_scale=True, mininterval=interval,
        disable=not source.archives,
    ) as bar:  # fmt: skip
        for shard, counts in zip(shards, _in_order(write, shards, workers), strict=True):
            all_counts.append(counts)
            for split, file in shard.files.items():
                for record in read_shard(file):
                    update_checksum(digests[split], *decode(record))
            images += sum(counts.values())
            left_out += shard.note.read_text("utf-8").count("\n")
            bar.set_postfix_str(f"{images:,} images, {left_out:,} unreadable", refresh=False)
            bar.update(shard.size)
    return all_counts, {split: each.hexdigest()[:16] for split, each in digests.items()}


def _in_order(
    write: Callable[[Shard], Counts], shards: Iterable[Shard], workers: int
) -> Iterator[Counts]:
    """`write(shard)` of all shards, by several processes."""
    if workers == 1:
        yield from map(write, _copied(shards))
        return
    ahead: collections.deque[Future[Counts]] = collections.deque()
    try:
        with _pool(workers) as pool:
            for shard in _copied(shards):
                ahead.append(pool.submit(write, shard))
                if len(ahead) > 2 * workers:  # enough that nobody waits, and that copies stay few
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        end = "was killed, perhaps" if isinstance(error, BrokenProcessPool) else "stopped"
        raise UsageError(
            f"a process that decodes images {end} for want of memory; run the same command again, "
            "with a lower --workers: what is finished is kept"
        ) from error


def _copied(shards: Iterable[Shard]) -> Iterator[Shard]:
    """The shards; what they read of a compressed tar, which is read forwards, is copied first."""
    stream = None
    for shard in shards:
        first = shard.members[0]
        if isinstance(first, TarMember) and is_gzip(first.path) and not shard.counts():
            stream = stream or gzip.open(first.path)  # noqa: SIM115 (read to the end)
            target = shard.note.with_suffix(".tar")
            tars = cast(tuple[TarMember, ...], shard.members)
            members = (member.copied(stream, target) for member in tars)
            shard = shard._replace(members=tuple(members))
        yield shard


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are started afresh, and end with this one however it ends."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # the parent has threads, of JAX say
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=processes.end_with_parent)

    def start() -> None:
        with processes.blocked_signals():
            for _ in range(workers):
                pool.submit(int)  # each starts a process

    try:
        with ThreadPoolExecutor(1) as thread:  # where Ctrl-C leaves no process half started
            thread.submit(start).result()
        yield pool
    except BaseException:  # Ctrl-C too: without waiting for the shards that are begun
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # SIGTERM is blocked in them
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _write_metadata(
    source: Source, contents: Contents, all_counts: Sequence[Counts], metadata: dict, folder: Path
) -> None:
    """What TFDS needs to read the shards."""
    image = tfds.features.Tensor(shape=source.image_shape, dtype=np.uint8, encoding="bytes")
    classes = [one_line(name) for name in contents.classes]
    label = {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    name, _, config = source.name.partition("/")
    identity = tfds.core.DatasetIdentity(
        name,
        tfds.core.Version(folder.name.split(".partial")[0]),
        os.fspath(folder),
        "",
        config or None,
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=source.about,
        features=tfds.features.FeaturesDict({"image": image, **label}),
        supervised_keys=("image", "label") if label else None,
        homepage=source.homepage,
        metadata=tfds.core.MetadataDict(resize=source.resize_method, **metadata),
        disable_shuffling=True,  # the order of the archive is the order on disk
    )
    info.set_file_format("array_record")
    lengths = {
        split: [counts[split] for counts in all_counts if split in counts]
        for split in metadata["checksums"]
    }
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths[split],
            num_bytes=sum(file.stat().st_size for file in folder.glob(f"*-{split}.array_record*")),
            filename_template=_template(source, folder, split),
        )
        for split in lengths
        if sum(lengths[split])
    ]
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)
