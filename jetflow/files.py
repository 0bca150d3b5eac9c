"""The files of a run: written whole, also by several processes at once, and read at one door."""

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging

from jetflow import hosts
from jetflow.buckets import AnyPath, is_bucket, raise_refusal, refusal, upload
from jetflow.types import UsageError

METRICS = "metrics.jsonl"
LARGEST = 2**63  # of a number, which others read too

# A shape says what a JSON file holds: a type, several, [the shape of each], or {key: shape}, where
# "key?" may be absent and `str` stands for all other keys. A float is a finite number.
NONE = type(None)
NUMBER = (float, NONE)  # None for one that is not finite
LINE_OF_METRICS = {"step": int, str: NUMBER}

# What a disk refuses: for want of room, or for what else a person can mend.
FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSALS = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
REFUSALS |= {errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.EIO}


@contextlib.contextmanager
def disk_errors_explained() -> Iterator[None]:
    """A UsageError, with the path and the remedy, in place of an error of a disk or a bucket."""
    try:
        yield
    except Exception as error:
        raise_refusal(error)
        if not isinstance(error, OSError) or error.errno not in REFUSALS:
            raise
        is_full, path = error.errno in FULL, error.filename or "the disk"
        remedy = "make room, and the same command goes on" if is_full else "give a path that can"
        raise UsageError(f"{path} cannot be used ({error.strerror}); {remedy}") from error


@contextlib.contextmanager
def naming(path: os.PathLike, *aliases: AnyPath) -> Iterator[None]:
    """Errors of a disk as OSErrors of this file: those of a full one name none, or an alias of it,
    and libraries in C++ raise what they like."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        codes = [code for code in REFUSALS if os.strerror(code) in str(error)]
        if not codes or getattr(error, "filename", None) not in (None, *map(str, aliases)):
            raise
        raise OSError(codes[0], os.strerror(codes[0]), str(path)) from error


@contextlib.contextmanager
def if_possible(what: str) -> Iterator[None]:
    """Go on where the disk does not take what is written here, with a warning."""
    try:
        yield
    except OSError as error:  # such as somebody else's folder, or a disk that is read-only
        logging.warning("%s is not kept (%s)", what, error)


@contextlib.contextmanager
def write_atomically(path: AnyPath) -> Iterator[BinaryIO]:
    """A file that replaces `path` at the end; if the context fails, nothing changes.

    Missing folders are made. Each of several writers has a temporary file; the last one wins. In a
    bucket the file is an object, which is uploaded at the end.

    Raises:
        OSError: with the path, if it cannot be written.
    """
    if is_bucket(path):
        with tempfile.NamedTemporaryFile() as file:
            yield file  # type: ignore[misc]
            file.flush()
            upload(Path(file.name), path)
        return
    # `tempfile` would make a file that other users cannot read.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # such as a name that is too long
                temporary.unlink(missing_ok=True)


def listed(folder: AnyPath) -> list[Any]:
    """The paths in a folder, [] without one; `glob` overlooks what a bucket does not answer."""
    return sorted(folder.iterdir()) if folder.exists() else []


def write_json(path: AnyPath, content: Any) -> None:
    """Write a JSON file whole, on the first process alone."""
    if not hosts.is_first():
        return
    text = json.dumps(content, indent=2) + "\n"
    with write_atomically(path) as file:
        file.write(text.encode())


def read_json(path: AnyPath, shape: Any = dict) -> Any:
    """The content of a JSON file of a shape.

    Raises:
        UsageError: if it cannot be read, or holds anything else.
    """
    try:
        return parse(path.read_bytes(), shape)
    except Exception as error:
        raise_refusal(error)
        if not isinstance(error, OSError | ValueError):
            raise
        raise UsageError(f"{path} cannot be read ({error}); restore it") from error


def scan_json(paths: Iterable[AnyPath], shape: Any) -> tuple[list[Any], list[str]]:
    """The contents of those JSON files that can be read, and what is wrong with the others."""
    contents, wrong = [], []
    for path in paths:
        try:
            contents.append(read_json(path, shape))
        except UsageError as error:
            if error.__cause__ and refusal(error.__cause__):  # the file may be sound
                raise
            wrong.append(str(error))
    return contents, wrong


def read_or_set_aside(path: AnyPath, shape: Any, default: Any) -> Any:
    """The content of a JSON file that can be done without: a damaged one counts as absent."""
    contents, wrong = scan_json([path] if path.exists() else [], shape)
    if wrong:
        set_aside(path, wrong[0])
    return contents[0] if contents else default


def set_aside(path: AnyPath, why: str) -> None:
    """Rename a damaged file, with a warning, so that another one can take its place."""
    if hosts.is_first():
        aside = path.with_name(f"{path.name}.{secrets.token_hex(2)}.damaged")
        try:
            path.replace(aside)
            logging.warning("%s; it is set aside as %s", why, aside)
        except OSError:  # such as a disk that is read-only
            logging.warning("%s; it counts as absent", why)


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] without one; what cannot be read is left out."""
    return scan_metrics(path)[0]


def scan_metrics(path: AnyPath) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a metrics.jsonl that can be read, and what is wrong with the file.

    A last line that a kill cut short is not wrong.
    """
    lines, wrong = [], []
    try:
        content = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except Exception as error:
        raise_refusal(error)
        if not isinstance(error, OSError):
            raise
        content, wrong = [b""], [str(error)]
    for number, line in enumerate(content, 1):
        try:
            lines.append(parse(line, LINE_OF_METRICS))
        except ValueError as error:
            wrong += [f"line {number}: {error}"] if number < len(content) else []
    return lines, [f"{path} cannot be read ({wrong[0]}; {len(wrong)} in all)"] if wrong else []


def parse(text: bytes, shape: Any) -> Any:
    """JSON of a shape; a ValueError says what is wrong."""
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # raises for halves of characters
        wrong = misfit(content, shape)
    except RecursionError:
        wrong = "it is nested too deep"
    if wrong:
        raise ValueError(wrong)
    return content


def misfit(value: Any, shape: Any, name: str = "") -> str:
    """What does not fit a shape, such as "flow.kind is 3; expected str"; "" if all does."""
    prefix = name and f"{name}."
    if isinstance(shape, list) and isinstance(value, list):
        shapes: dict[Any, Any] = dict.fromkeys(range(len(value)), shape[0])
    elif isinstance(shape, dict) and isinstance(value, dict):
        known = {key: one for key, one in shape.items() if key is not str}
        for key in known:
            if not key.endswith("?") and key not in value:
                return f"{prefix}{key} is missing"
        shapes = {key: known.get(key, known.get(f"{key}?", shape.get(str))) for key in value}
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if fits and (not isinstance(value, int | float) or abs(value) < LARGEST):
            return ""
        expected = " or ".join(getattr(kind, "__name__", type(kind).__name__) for kind in kinds)
        return f"{name or 'it'} is {value!r:.60}; expected {expected}".replace("NoneType", "null")
    parts = (misfit(value[key], one, f"{prefix}{key}") for key, one in shapes.items() if one)
    return next(filter(None, parts), "")


def check_writable(option: str, path: AnyPath | None) -> None:
    """Raise a UsageError if a file cannot be written there: before the work, not after it."""
    if path is None:
        return
    if is_bucket(path):
        probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        with write_atomically(probe):
            pass
        probe.unlink()
        return
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--{option} {path} cannot be written; give the path of a new file")
