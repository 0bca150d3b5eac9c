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
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from jetflow import hosts
from jetflow.data import shards as tfds_format
from jetflow.data.archives import DAMAGE, entries
from jetflow.data.images import MAX_PIXELS, Unreadable, large_files
from jetflow.data.shards import Shard, one_line
from jetflow.data.source import Contents, Image, Member, Source, name_hash
from jetflow.files import write_atomically
from jetflow.types import NO_LABEL, UsageError

A = TypeVar("A")
B = TypeVar("B")

UNREADABLE = "unreadable.tsv"  # name and reason of each image that was left out
ORIGIN = "origin.tsv"  # name, bytes and time of each file of the archives

# What a kill may cost: some 5,000 photographs.
SHARD_BYTES, SHARD_MEMBERS = 512 * 2**20, 4096


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

    Arguments and errors as for `dataset.prepare`, with so many threads that decode.
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
                partial = _begin(source, folder, origin)
                record = functools.partial(_record, source, max_pixels)
                _make(source, paths, partial, record, threads, leave_out)
                if overwrite:
                    shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
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
    lines = []
    for path in paths:
        state = path.stat()
        files = [("", state.st_size, state.st_mtime_ns)]
        if path.is_dir():
            files = [(file.name, file.size, file.modified) for file in entries(path)]
        for name, size, modified in files:
            lines.append(f"{one_line(f'{path.name}/{name}')}\t{size}\t{modified}\n")
    return "".join(lines)


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


def _begin(source: Source, folder: Path, origin: str) -> Path:
    """The folder for what is not finished, without what an earlier start made of other archives."""
    # What needs no archive has nothing to go on with, and so a folder for each process: on a disk
    # without locks several may be here.
    own = "" if source.archives else f".{secrets.token_hex(4)}"
    partial = folder.with_name(f"{folder.name}.partial{own}")
    record = partial / ORIGIN
    if record.exists() and record.read_text("utf-8") != origin:
        print(f"{partial} was begun with other archives; starting anew", file=sys.stderr)
        shutil.rmtree(partial)
    for path in partial.glob("*.incomplete"):  # of a kill
        path.unlink()
    (partial / "notes").mkdir(parents=True, exist_ok=True)
    with write_atomically(record) as file:
        file.write(origin.encode())
    return partial


def _make(
    source: Source,
    paths: Sequence[Path],
    folder: Path,
    record: Callable[..., tuple[str, bytes | str]],
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
        if contents.left_out:
            folders = ", ".join(f"{name} ({n:,} images)" for name, n in contents.left_out.items())
            text = f"of no split, or of no class in train, are {folders}"
            if not leave_out:
                raise UsageError(f"{text}; move or rename them, or give --leave_out")
            print(text, file=sys.stderr)
        shards = _shards(source, contents, folder)
        notes, checksums = _write(source, shards, record, bool(contents.classes), threads)
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
    left_out = [line for note in notes for line in note["left_out"]]
    for split in ("train", *(split for split in source.splits if contents.splits.get(split))):
        if not any(note["counts"].get(split) for note in notes):
            first = f"; left out were {len(left_out):,} files, first {left_out[0]!r}"
            raise UsageError(
                f"{place} has not one readable image for split {split}{first * bool(left_out)}"
            )
    (folder / UNREADABLE).write_text("".join(f"{line}\n" for line in left_out), "utf-8")
    tfds_format.write_metadata(
        source, contents, notes, folder, origin=one_line(place), checksums=checksums
    )
    shutil.rmtree(folder / "notes")


def _shards(source: Source, contents: Contents, folder: Path) -> list[Shard]:
    """Of neighbours, in order: up to `SHARD_BYTES`, and up to `SHARD_MEMBERS` of them."""
    shards = []
    for split, members in contents.splits.items():
        groups: list[list[Member]] = []
        size = 0
        for member in members:
            size += member.size
            if not groups or size > SHARD_BYTES or len(groups[-1]) == SHARD_MEMBERS:
                groups.append([])
                size = member.size
            groups[-1].append(member)
        splits = list(contents.splits) if source.held_out else [split]
        templates = {each: tfds_format.template(source, folder, each) for each in splits}
        for number, group in enumerate(groups):
            files = {
                each: Path(template.sharded_filepath(shard_index=number, num_shards=len(groups)))
                for each, template in templates.items()
            }
            note = folder / "notes" / f"{split}-{number:06d}.json"
            shards.append(Shard(split, tuple(group), files, note))
    return shards


def _record(
    source: Source, max_pixels: int, split: str, is_labelled: bool, image: Image
) -> tuple[str, bytes | str]:
    try:
        content = tfds_format.encode(
            source.pixels(image, max_pixels), image.label if is_labelled else None
        )
        if is_labelled and image.label == NO_LABEL:
            raise Unreadable("a sound image, but of no class")
    except Unreadable as reason:
        return split, f"{one_line(image.name)}\t{one_line(str(reason))}"
    name = image.name.split("/")[-1]
    is_held_out = source.held_out and name_hash(name) % source.held_out == 0
    return "validation" if is_held_out else split, content


def _write(
    source: Source,
    shards: Sequence[Shard],
    record: Callable[..., tuple[str, bytes | str]],
    is_labelled: bool,
    threads: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write every shard that is not there yet; the notes of all, and the splits' checksums."""
    digests = {split: hashlib.sha256() for shard in shards for split in shard.files}
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of a log
    total = sum(shard.size for shard in shards)
    notes: list[dict[str, Any]] = []
    with (
        tqdm(
            total=total, desc=source.name, unit="B", unit_scale=True, mininterval=interval,
            disable=not source.archives,
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):  # fmt: skip
        for shard in shards:
            if not shard.written():
                inside = (image for member in shard.members for image in member.images)
                function = functools.partial(record, shard.split, is_labelled)
                shard.write(_mapped(function, inside, pool, ahead=4 * threads))
            notes.append(shard.written() or {})
            for split, file in shard.files.items():
                for content in tfds_format.read_shard(file):
                    tfds_format.update_checksum(digests[split], *tfds_format.decode(content))
            images = sum(sum(note["counts"].values()) for note in notes)
            left_out = sum(len(note["left_out"]) for note in notes)
            bar.set_postfix_str(f"{images:,} images, {left_out:,} unreadable", refresh=False)
            bar.update(shard.size)
    return notes, {split: each.hexdigest()[:16] for split, each in digests.items()}


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
