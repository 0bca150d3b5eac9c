"""Buckets, as `gs://bucket/run`: their paths, files kept in step with them, and leases for locks.

Paths are epath's, files go through fsspec, and leases through TensorStore, which can write an
object on condition that nobody else has written it.
"""

import contextlib
import importlib
import json
import logging as standard_logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import psutil
import tensorstore
from absl import logging
from etils import epath
from fsspec import config as fsspec_config
from fsspec import url_to_fs

from jetflow.types import Interruption, UsageError

AnyPath: TypeAlias = Path | epath.Path  # of this machine, or of a bucket

RENEWED_SECONDS = 5.0  # between the signs of life of who holds a lease
EXPIRES_SECONDS = 45.0  # without one, after which a lease is free
WATCHED_SECONDS = 12.0  # at the least, as clocks of two machines differ
MIRRORED_SECONDS = 30  # between copies of a growing file

# Whose errors are a bucket's, a network's or a permission's, and what others say of these.
LIBRARIES = {"gcsfs", "google", "aiohttp", "requests"}
STATUS = "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|INTERNAL:"
STATUS += "|RESOURCE_EXHAUSTED|CURL error|retry attempts|Forbidden|storage/v1"
OBJECT = re.compile(r"\S*\bb/([^/ ]+)/o\b(/[^ ?)]*)?\S*")  # as the JSON API calls gs://BUCKET/NAME
DENIED = "PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|[Cc]redentials|\\b40[134]\\b"

# They also raise what they log.
for _library in ("gcsfs", "google.auth"):
    standard_logging.getLogger(_library).setLevel(standard_logging.CRITICAL)

# A process sees what others write.
fsspec_config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def as_path(text: str | os.PathLike) -> AnyPath:
    """A path of this machine, or of a bucket: an `epath.Path`, which acts like one of pathlib.

    Raises:
        UsageError: it names no bucket, or one of an unknown kind, or its library is not installed.
    """
    text = os.fspath(text)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)", text)  # pathlib makes one slash of two
    if match is None:
        return Path(text)
    if match[1] != "gs" or text[match.end() :].startswith("/") or text == match[0]:
        wrong = "names no bucket" if match[1] == "gs" else "has an unknown scheme"
        case = ", in lower case" if match[1] == "GS" else ""
        raise UsageError(f"{text} {wrong}; expected a path of this machine, or gs://BUCKET/…{case}")
    try:
        importlib.import_module("gcsfs")
    except ImportError as error:
        raise UsageError(f"{text} needs gcsfs: pip install 'jetflow[gcs]'") from error
    return epath.Path(f"gs://{text[match.end() :]}")


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is one of a bucket."""
    return "://" in os.fspath(path)


def resolved(path: AnyPath) -> AnyPath:
    """The path from the root of this machine; that of a bucket as it is."""
    return path if is_bucket(path) else path.resolve()


def upload(file: Path, path: AnyPath) -> None:
    """Make an object of a bucket of a file, whole or not at all."""
    system, name = url_to_fs(os.fspath(path))
    system.put_file(os.fspath(file), name)


def download(path: AnyPath, file: Path) -> None:
    """Make a file of an object of a bucket; FileNotFoundError where there is none."""
    system, name = url_to_fs(os.fspath(path))
    system.get_file(name, os.fspath(file))


def refusal(error: BaseException) -> UsageError | None:
    """What a bucket or its network refused, in one line; None for an error of anything else.

    An `Interruption` where the same command may succeed later.
    """
    text = " ".join(str(error).split())[:300] or type(error).__name__
    path = OBJECT.sub(lambda match: f"gs://{match[1]}{unquote(match[2] or '/')}", text)
    is_missing = isinstance(error, FileNotFoundError) and "/upload/" not in text  # an object
    if isinstance(error, UsageError | BrokenPipeError) or is_missing:
        return None
    is_plain = isinstance(error, OSError | ValueError) and not getattr(error, "errno", None)
    is_plain &= "local file" not in text  # which TensorStore has the same words for
    is_refused = isinstance(error, TimeoutError | ConnectionError)
    is_refused |= type(error).__module__.partition(".")[0] in LIBRARIES
    if not (is_refused or (is_plain and re.search(STATUS, text))):
        return refusal(error.__cause__) if error.__cause__ else None
    if isinstance(error, FileNotFoundError) or re.search(DENIED, text):
        return UsageError(f"a bucket refuses ({path}); see to its name and your permissions for it")
    return Interruption(f"a bucket did not answer ({path}); the same command goes on")


def raise_refusal(error: BaseException) -> None:
    """Raise what a bucket or its network refused, if that is what the error is of."""
    if refused := refusal(error):
        raise refused from error


class Mirror:
    """A folder in which files grow; for a bucket one of this machine, copied there.

    A kill leaves it behind, where it is of no use: the next process makes its own of the bucket.

    Attributes:
        folder: where to write.

    Args:
        target: the folder, of this machine or of a bucket.
    """

    def __init__(self, target: AnyPath):
        self._target, self.folder = target, target
        self._sizes: dict[Path, int] = {}
        self._copied, self._pool = time.monotonic(), ThreadPoolExecutor(1)
        self._copying: Future | None = None
        self._own: Path | None = None
        if is_bucket(target):
            self.folder = self._own = Path(tempfile.mkdtemp(prefix="jetflow-"))

    def copy(self, *, wait: bool = False) -> None:
        """Bring the bucket up to date: now, or in the background, if the last time is long ago.

        Raises:
            Exception: with `wait`, whatever the bucket refuses.
        """
        if self._own is None:
            return
        is_due = time.monotonic() - self._copied > MIRRORED_SECONDS
        if wait or (is_due and (self._copying is None or self._copying.done())):
            self._copied = time.monotonic()
            self._copying = self._pool.submit(self._copy)
            if wait:
                self._copying.result()

    def close(self) -> None:
        """Copy what is left, with a warning if that fails, and remove the folder."""
        if self._own is not None:
            try:
                self.copy(wait=True)
            except Exception as error:
                logging.warning("not all of %s was written (%s)", self._target, error)
            self._pool.shutdown()
            shutil.rmtree(self._own, ignore_errors=True)

    def _copy(self) -> None:
        assert self._own
        for file in self._own.rglob("*"):
            if file.is_file() and (size := file.stat().st_size) != self._sizes.get(file):
                upload(file, self._target / file.relative_to(self._own).as_posix())
                self._sizes[file] = size


@contextlib.contextmanager
def leased(path: AnyPath, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lease at `path`; with `wait`, as soon as no other one does.

    The lease is an object that tells its holder, who writes it anew every few seconds. One that
    stays as it is for `EXPIRES_SECONDS` is taken over, with a warning; one of a process of this
    machine that has ended at once. A holder that was only slow ends when it notices.
    """
    lease = _Lease(path)
    mine = lease.take(wait=wait)
    try:
        yield mine
    finally:
        if mine:
            lease.give_back()


class _Lease(threading.Thread):
    def __init__(self, path: AnyPath):
        super().__init__(daemon=True)
        self._path, self._key, self._over = path, path.name, threading.Event()
        self._store: Any = tensorstore.KvStore.open(f"{os.fspath(path.parent)}/").result()
        process = psutil.Process()
        self._holder = {
            "host": socket.gethostname(),
            "process": process.pid,
            "begun": process.create_time(),
            "machine": _machine(),
            "token": secrets.token_hex(4),
        }
        self._generation = b""

    def take(self, *, wait: bool) -> bool:
        before, since, told = None, 0.0, False
        while True:
            found = self._store.read(self._key).result()
            generation = found.stamp.generation
            lives = before not in (None, generation)
            if before != generation:  # it is watched from here on, however long the answer took
                before, since = generation, time.monotonic()
            watched = time.monotonic() - since
            holder = _parsed(found.value) if found.state == "value" else None
            if holder is None or _has_ended(holder) or _is_left(holder, watched):
                if self._write(generation):
                    if holder is not None:
                        logging.warning("%s of %s is taken over", self._path, _name(holder))
                    self.start()
                    return True
            elif lives and not wait:
                return False
            elif not told and watched > 1:
                told = True
                logging.warning(
                    "%s is held by %s; watching for up to %d s whether that one still lives",
                    self._path, _name(holder), EXPIRES_SECONDS,
                )  # fmt: skip
            time.sleep(0.5)

    def run(self) -> None:
        """Renew it until it is given back."""
        while not self._over.wait(RENEWED_SECONDS):
            try:
                kept = self._write(self._generation)
            except ValueError as error:  # what TensorStore raises, after it has tried for long
                logging.warning("%s could not be renewed (%s)", self._path, str(error)[:200])
                continue
            if not kept and not self._over.is_set():
                with contextlib.suppress(Exception):  # it must end, whatever can be said
                    other = _parsed(self._store.read(self._key).result().value)
                    print(
                        f"jetflow: {self._path} was taken over by {_name(other)}, as this process "
                        "had given no sign of life; it ends here and leaves the rest to that one",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                os._exit(1)

    def give_back(self) -> None:
        self._over.set()
        self.join()
        try:
            self._store.write(self._key, None, if_equal=self._generation).result()
        except ValueError as error:
            logging.warning("%s could not be removed (%s)", self._path, str(error)[:200])

    def _write(self, generation: bytes) -> bool:
        """Whether the object was still of this generation, and is now ours."""
        content = json.dumps({**self._holder, "renewed": time.time()}).encode()
        try:
            stamp = self._store.write(self._key, content, if_equal=generation).result()
        except ValueError as error:
            if "NOT_FOUND" not in str(error):
                raise
            raise UsageError(f"{self._path.parent}: there is no such bucket; make it") from error
        if not stamp.generation:
            # The answer to a write that was made may be lost, and the write tried again.
            found = self._store.read(self._key).result()
            if found.state != "value" or _parsed(found.value)["token"] != self._holder["token"]:
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True


def _machine() -> str:
    """Names where a process number means something: a start of a machine, a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: then only time shows that a process has ended
        return secrets.token_hex(8)


def _has_ended(holder: Mapping[str, Any]) -> bool:
    """Whether a holder was a process of this machine, and is gone."""
    if holder.get("machine") != _machine():
        return False
    try:
        return psutil.Process(holder["process"]).create_time() != holder["begun"]
    except psutil.NoSuchProcess:
        return True


def _is_left(holder: Mapping[str, Any], watched: float) -> bool:
    """Whether a lease that did not change while it was watched counts as left behind."""
    is_old = time.time() > holder["renewed"] + EXPIRES_SECONDS
    return watched > EXPIRES_SECONDS or (watched > WATCHED_SECONDS and is_old)


def _name(holder: Mapping[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(holder["renewed"]))
    return f"process {holder['process']} of {holder['host']} (last sign at {when})"


def _parsed(content: bytes) -> dict[str, Any]:
    """The holder that a lease tells; of one that cannot be read, an unknown one."""
    unknown = {"host": "an unknown machine", "process": 0, "renewed": 0.0, "token": ""}
    try:
        return unknown | json.loads(content)
    except (TypeError, ValueError):
        return unknown
