"""Archives to a TFDS data set of ArrayRecord shards.

Threads decode the images: Pillow does so outside of Python's lock. Each shard is written beside its
place and then renamed. Prepared again after a kill, a data set keeps the shards that are whole.
Until all is done, its folder is called `….partial`. Order and bytes do not depend on the number of
threads.

In a bucket nothing can be renamed. Each shard is made on this machine, uploaded and forgotten, a
note behind it, and dataset_info.json comes last: without it, the folder counts as partial.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath
from tqdm import tqdm

from jetflow.buckets import AnyPath, download, is_bucket, raise_refusal, upload
from jetflow.data import shards
from jetflow.data.archives import DAMAGE, entries
from jetflow.data.cache import METADATA, locked_in_turn
from jetflow.data.images import MAX_PIXELS, Unreadable, large_files
from jetflow.data.reading import cores, mapped
from jetflow.data.shards import one_line
from jetflow.data.source import Contents, Image, Member, Source, grouped, name_hash
from jetflow.files import write_atomically
from jetflow.options import MOST_WORKERS, DataFolders, option
from jetflow.types import NO_LABEL, UsageError

UNREADABLE = "unreadable.tsv"  # name and reason of each image that was left out
ORIGIN = "origin.tsv"  # name, bytes and time of each file of the archives, and the limit
NOTES = "notes"  # a folder: what `shards.write` notes of each shard

# What a kill may cost: some 5,000 photographs.
SHARD_BYTES, SHARD_MEMBERS = 512 * 2**20, 4096


def is_prepared(folder: AnyPath) -> bool:
    return _exists(folder / METADATA[0])


def _exists(path: AnyPath) -> bool:
    # os.path says so of a name that is too long, too.
    return path.exists() if is_bucket(path) else os.path.exists(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions(DataFolders):
    """How a data set is prepared, and where."""

    manual_dir: Path | None = option(
        None, "the folder of the archives; default: downloads/manual in the data directory"
    )
    workers: int | None = option(
        None, "threads that decode images; default: all cores", least=1, most=MOST_WORKERS
    )
    max_pixels: int = option(MAX_PIXELS, "an image that has more is left out", least=1)
    leave_out: bool = option(
        False, "go on without folders of images that belong to no split or class"
    )
    overwrite: bool = option(False, "prepare it anew although it is there")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A data set on its way from `manual_dir` to `folder`."""

    source: Source
    folder: AnyPath
    manual_dir: Path
    options: PrepareOptions = PrepareOptions(workers=1)

    @large_files()
    def run(self) -> None:
        """Prepare it, unless that is done, by this process or by another one, which is awaited.

        Raises:
            UsageError: archives are missing or damaged, or others than those that it was prepared
                from; or `folder` cannot be written.
        """
        paths = self.source.paths(self.manual_dir)
        origin, is_local = self._origin(paths), not is_bucket(self.folder)
        try:
            if not self._is_done():
                is_incomplete = is_local and self.folder.exists() and not is_prepared(self.folder)
                if is_incomplete and not self.options.overwrite:
                    raise UsageError(
                        f"{self.folder} is there without a complete data set; prepare it anew with "
                        f"`jetflow prepare {self.source.name} --overwrite`"
                    )
                if is_local:
                    self.folder.parent.mkdir(parents=True, exist_ok=True)
                lock = self.folder.with_name(f"{self.folder.name}.lock")
                with locked_in_turn(lock, f"prepares {self.source.name}"):
                    if not self._is_done():
                        with self._partial(origin) as partial:
                            self._make(paths, partial)
                            self._publish(partial)
        except OSError as error:
            raise_refusal(error)
            if not self._is_done():  # else, on a disk without locks, another process was first
                raise UsageError(
                    f"data set {self.source.name!r} cannot be prepared in {self.folder} ({error}); "
                    "make room and make it writable, and run the same command again, which keeps "
                    "what is finished, or set --data_dir or TFDS_DATA_DIR to another directory"
                ) from error
        self._check(origin)  # also of what another process has made meanwhile

    def _is_done(self) -> bool:
        return is_prepared(self.folder) and not self.options.overwrite

    def _publish(self, partial: Path) -> None:
        """Make what is finished the data set, at once."""
        if isinstance(self.folder, epath.Path):
            last = partial / METADATA[0]
            for file in [path for path in partial.iterdir() if path.is_file() and path != last]:
                upload(file, self.folder / file.name)
            upload(last, self.folder / last.name)
            (self.folder / NOTES).rmtree()
            return
        old = self.folder.with_name(f"{self.folder.name}.old")
        if self.options.overwrite and self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a kill
            self.folder.rename(old)
        partial.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _origin(self, paths: Sequence[Path]) -> str:
        """A line for each file of the archives that is read: name, bytes and time; the limit."""
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        known, lines = _lines(self.folder) | _lines(partial), []  # those are not opened again
        for path in paths:
            state = path.stat()
            files = [("", state.st_size, state.st_mtime_ns)]
            if path.is_dir():
                files = [(file.name, file.size, file.modified) for file in entries(path)]
            for name, size, modified in files:
                line = f"{one_line(str(PurePosixPath(path.name, name)))}\t{size}\t{modified}"
                if line in known or self.source.is_read(path / name):
                    lines.append(f"{line}\n")
        if paths and self.options.max_pixels != MAX_PIXELS:
            lines.append(f"--max_pixels {self.options.max_pixels}\n")
        return "".join(lines)

    def _check(self, origin: str) -> None:
        before = _lines(self.folder)
        if before and (changed := before ^ set(origin.splitlines())):
            names = sorted({line.split("\t")[0] for line in changed})
            raise UsageError(
                f"{self.source.name} was prepared in {self.folder} from other files than those in "
                f"{self.manual_dir} now, or another --max_pixels: {len(names):,} differ, "
                f"{names[0]!r} for one; give --overwrite to prepare it anew, or another --data_dir"
            )

    @contextlib.contextmanager
    def _partial(self, origin: str) -> Iterator[Path]:
        """The folder for what is not finished, without what came of other archives."""
        if isinstance(self.folder, epath.Path):
            if self.options.data_cache:
                self.options.data_cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.options.data_cache) as scratch:
                partial = Path(scratch, self.folder.name)
                (partial / NOTES).mkdir(parents=True)
                (partial / ORIGIN).write_bytes(origin.encode())
                yield partial
            return
        # What needs no archive has nothing to go on with, and so a folder for each process: on a
        # disk without locks several may be here.
        own = "" if self.source.archives else f".{secrets.token_hex(4)}"
        partial = self.folder.with_name(f"{self.folder.name}.partial{own}")
        record = partial / ORIGIN
        if record.exists() and record.read_bytes() != origin.encode():
            print(f"{partial} was begun with other files or limits; starting anew", file=sys.stderr)
            shutil.rmtree(partial)
        for path in partial.glob("*.incomplete"):  # of a kill
            path.unlink()
        (partial / NOTES).mkdir(parents=True, exist_ok=True)
        with write_atomically(record) as file:
            file.write(origin.encode())
        try:
            yield partial
        finally:
            if own:
                shutil.rmtree(partial, ignore_errors=True)

    def _make(self, paths: Sequence[Path], folder: Path) -> None:
        place = " and ".join(map(str, paths))
        try:
            contents = self.source.contents(paths, folder / NOTES, self.options.max_pixels)
            self._check_left_out(contents)
            if isinstance(self.folder, epath.Path):
                self._begin(self.folder, folder / ORIGIN)
            notes, checksums = self._write(contents, folder)
        except DAMAGE as error:
            raise UsageError(
                f"an archive of {self.source.name} is damaged, or not what its name says: {place} "
                f"({' '.join(str(error).split())}); bring it again, and run the same command"
            ) from error
        except MemoryError as error:
            raise UsageError(
                "not enough memory to decode; run the same command again with a lower --workers, "
                "which keeps what is finished, or with a lower --max_pixels, which begins anew"
            ) from error
        left_out = [line for note in notes for line in note["left_out"]]
        for split in ("train", *filter(contents.splits.get, self.source.splits)):
            if not any(note["counts"].get(split) for note in notes):
                first = f"; left out were {len(left_out):,} files, first {left_out[:1]}"
                raise UsageError(f"{place} has not one readable image for split {split}{first}")
        (folder / UNREADABLE).write_text("".join(f"{line}\n" for line in left_out), "utf-8")
        facts = {"origin": one_line(place), "checksums": checksums}
        shards.write_metadata(self.source, contents, notes, folder, **facts)
        shutil.rmtree(folder / NOTES)

    def _begin(self, folder: epath.Path, record: Path) -> None:
        """Leave in the bucket no data set, and of one that was begun what came of these files."""
        known, is_done = folder / ORIGIN, is_prepared(folder)
        if is_done or not known.exists() or known.read_bytes() != record.read_bytes():
            (folder / METADATA[0]).unlink(missing_ok=True)
            folder.rmtree(missing_ok=True)
            upload(record, known)

    def _kept(self, note: Path, files: Mapping[str, Path]) -> dict[Path, AnyPath]:
        """The files of a shard, the note last, and where they are kept in a bucket."""
        if not is_bucket(self.folder):
            return {}
        folder = note.parent.parent
        return {path: self.folder / path.relative_to(folder) for path in (*files.values(), note)}

    def _check_left_out(self, contents: Contents) -> None:
        if contents.left_out:
            folders = ", ".join(f"{name} ({n:,} images)" for name, n in contents.left_out.items())
            text = f"of no split, or of no class in train, are {folders}"
            if not self.options.leave_out:
                raise UsageError(f"{text}; move or rename them, or give --leave_out")
            print(text, file=sys.stderr)

    def _write(
        self, contents: Contents, folder: Path
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Write every shard that is not there yet; the notes of all, and the splits' checksums."""
        digests = {split: hashlib.sha256() for split in contents.splits}
        threads = self.options.workers or cores()
        interval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of a log
        total = sum(member.size for members in contents.splits.values() for member in members)
        notes, images, left_out = [], 0, 0
        with (
            tqdm(
                total=total, desc=self.source.name, unit="B", unit_scale=True,
                mininterval=interval, disable=not self.source.archives,
            ) as bar,
            ThreadPoolExecutor(threads) as pool,
        ):  # fmt: skip
            for split, group, files, note in self._shards(contents, folder):
                kept = self._kept(note, files)
                for path in kept if kept and kept[note].exists() else ():
                    with contextlib.suppress(FileNotFoundError):
                        download(kept[path], path)
                if not (facts := shards.written(note, files, digests)):
                    inside = (image for member in group for image in member.images)
                    record = functools.partial(self._record, split, bool(contents.classes))
                    shards.write(note, files, mapped(record, inside, pool, ahead=2 * threads))
                    if not (facts := shards.written(note, files, digests)):
                        raise OSError(f"{note.stem} does not read as it was written")
                    for path in kept:
                        upload(path, kept[path])
                for path in kept:
                    path.unlink(missing_ok=True)
                notes.append(facts)
                images += sum(facts["counts"].values())
                left_out += len(facts["left_out"])
                bar.set_postfix_str(f"{images:,} images, {left_out:,} unreadable", refresh=False)
                bar.update(sum(member.size for member in group))
        return notes, {split: each.hexdigest()[:16] for split, each in digests.items()}

    def _shards(
        self, contents: Contents, folder: Path
    ) -> Iterator[tuple[str, list[Member], dict[str, Path], Path]]:
        """The split and the members of each shard in order, its file in each split, its note."""
        name = self.source.name.split("/")[0]
        for split, members in contents.splits.items():
            groups = grouped(members, SHARD_BYTES, SHARD_MEMBERS)
            splits = contents.splits if self.source.held_out else [split]
            for number, group in enumerate(groups):
                end = f"array_record-{number:05d}-of-{len(groups):05d}"  # as TFDS calls them
                files = {each: folder / f"{name}-{each}.{end}" for each in splits}
                yield split, group, files, folder / NOTES / f"{split}-{number:06d}.json"

    def _record(self, split: str, is_labelled: bool, image: Image) -> tuple[str, bytes | str]:
        """Its split and record, or the line that says why it is left out."""
        try:
            pixels = self.source.pixels(image, self.options.max_pixels)
            if is_labelled and image.label == NO_LABEL:
                raise Unreadable("a sound image, but of no class")
        except Unreadable as reason:
            return split, f"{one_line(image.name)}\t{one_line(str(reason))}"
        share = self.source.held_out
        is_held_out = share and name_hash(image.name.split("/")[-1]) % share == 0
        content = shards.encode(pixels, image.label if is_labelled else None)
        return "validation" if is_held_out else split, content


def _lines(folder: AnyPath) -> set[str]:
    file = folder / ORIGIN
    return set(file.read_bytes().decode("utf-8", "replace").splitlines() if _exists(file) else ())
