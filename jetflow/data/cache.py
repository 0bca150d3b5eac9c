"""Copies of a bucket's data sets on this machine, one for all its processes, within bounds.

A copy is named after its data set and what this one's metadata say, checksums among it: a data set
that is prepared anew gets another copy. A file is whole when it has its name. Who reads a copy
holds its lock together with others, and who removes it alone.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jetflow import hosts, rollcall
from jetflow.buckets import AnyPath, download
from jetflow.files import write_atomically
from jetflow.options import DataOptions, expanded
from jetflow.types import UsageError

# The first one is written last: without it there is no data set.
METADATA = ("dataset_info.json", "features.json", "metadata.json")
THREADS = 4  # files that are copied at once
SHARE = 0.95  # of a disk's free room that copies may take
GB = 1e9


@contextlib.contextmanager
def locked_in_turn(lock: AnyPath, what: str) -> Iterator[None]:
    """With a lock, as soon as no other process has it; a line says which one this one waits for."""
    told = False
    with contextlib.ExitStack() as stack:
        while not stack.enter_context(hosts.locked(lock, wait=False)):
            stack.close()
            if not told:
                print(f"another process {what}; waiting", file=sys.stderr, flush=True)
            told = True
            rollcall.advance()  # if anything is stuck, it is the other one
            time.sleep(1)
        yield


class Copy:
    """The copy of a data set, which is not removed before it is closed; at first its metadata.

    Attributes:
        folder: as that of a prepared data set.
        copied: bytes of images that this process has copied.

    Args:
        name: of the data set.
        origin: its folder in a bucket.
    """

    def __init__(self, name: str, origin: AnyPath, options: DataOptions):
        root = options.data_cache or Path("~/.cache/jetflow/data")
        self._root, self._limit = expanded("data_cache", root).absolute(), options.data_cache_gb
        self._name, self._origin, self.copied = name, origin, 0
        self._metadata = self._read_metadata()
        digest = hashlib.sha256(b"\0".join(self._metadata.values())).hexdigest()[:16]
        self.folder = self._root / f"{re.sub('[^A-Za-z0-9]+', '-', name)[:80]}-{digest}"
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = open(f"{self.folder}.lock", "ab")  # noqa: SIM115 (until it is closed)
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        os.utime(self._lock.name)
        for file, content in self._metadata.items():
            with write_atomically(self.folder / file) as written:
                written.write(content)

    def fetch(self, sizes: Mapping[str, int]) -> None:
        """Copy those files, of so many bytes, that are not here yet.

        Raises:
            UsageError: there is no room, or the data set has changed.
        """
        if not self._missing(sizes):
            return
        what = f"copies data of a bucket to {self._root}"
        with locked_in_turn(self._root / "copying", what):
            for file in self.folder.glob("*array_record*.tmp"):  # of a kill
                file.unlink()
            missing = self._missing(sizes)
            self._make_room(sum(missing.values()))
            bar = hosts.progress(len(missing), f"copying {self._name}", "files", shown=True)
            with bar, ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(self._fetch, missing, missing.values()):
                    bar.update()
                    rollcall.advance()
            self.copied += sum(missing.values())

    def close(self) -> None:
        """Let the copy be removed, when others need the room."""
        self._lock.close()

    def _missing(self, sizes: Mapping[str, int]) -> dict[str, int]:
        paths = {file: self.folder / file for file in sizes}
        whole = {file: path.exists() and path.stat().st_size for file, path in paths.items()}
        return {file: size for file, size in sizes.items() if whole[file] != size}

    def _fetch(self, file: str, size: int) -> None:
        with write_atomically(self.folder / file) as written:
            with contextlib.suppress(FileNotFoundError):
                download(self._origin / file, Path(written.name))
            # Nothing of a data set is written anew before its metadata are gone.
            is_same = self._read_metadata() == self._metadata
            if not is_same or os.path.getsize(written.name) != size:
                raise self._changed()

    def _read_metadata(self) -> dict[str, bytes]:
        try:
            return {file: (self._origin / file).read_bytes() for file in METADATA}
        except FileNotFoundError as error:
            raise self._changed() from error

    def _changed(self) -> UsageError:
        return UsageError(
            f"data set {self._name!r} in {self._origin} is damaged, or being prepared anew; run "
            "the same command again when that is done"
        )

    def _make_room(self, missing: int) -> None:
        """Remove copies that were not used for longest, until so many bytes more have room."""
        locks = sorted(self._root.glob("*.lock"), key=lambda lock: lock.stat().st_mtime)
        sizes = {lock: _size(lock.with_suffix("")) for lock in locks}
        room = SHARE * (sum(sizes.values()) + shutil.disk_usage(self._root).free)
        room = room if self._limit is None else min(room, self._limit * GB)
        wanted = sizes.pop(Path(self._lock.name)) + missing
        for lock in sizes:
            if wanted <= room < wanted + sum(sizes.values()) and _removed(lock):
                sizes[lock] = 0
        used = sum(sizes.values()) if wanted <= room else 0
        if wanted + used > room:
            raise UsageError(
                f"the copy of {self._name} takes {wanted / GB:.3g} GB, but {self._root} has room "
                f"for {max(room - used, 0) / GB:.3g} GB; give another --data_cache or a higher "
                "--data_cache_gb, or end what reads other data sets there"
            )


def _size(folder: Path) -> int:
    size = 0
    for file in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has renamed it
            size += file.stat().st_size
    return size


def _removed(lock: Path) -> bool:
    """Whether the copy of a lock could be removed, as nobody reads it."""
    with open(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        return True
