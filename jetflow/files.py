"""The files of a run: written whole, also by several processes at once, and read at one door."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jetflow import hosts
from jetflow.types import UsageError

T = TypeVar("T", bound=dict | list)

METRICS = "metrics.jsonl"


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` at the end; if the context fails, nothing changes.

    Missing folders are made. Each of several writers has a temporary file; the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # `tempfile` would make a file that other users cannot read.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole, on the first process alone."""
    if not hosts.is_first():
        return
    text = json.dumps(content, indent=2) + "\n"
    with write_atomically(path) as file:
        file.write(text.encode())


def read_json(path: Path, kind: type[T] = dict) -> T:
    """The content of a JSON file, a dict or a list; a UsageError where it is anything else."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, kind):
            raise ValueError(f"a {type(content).__name__}, expected a {kind.__name__}")
    except (OSError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise UsageError(f"{path} is not readable JSON ({error}); restore it") from error
    return content


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] without one; a line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def check_writable(option: str, path: Path | None) -> None:
    """Raise a UsageError if a file cannot be written there: before the work, not after it."""
    if path is None:
        return
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--{option} {path} cannot be written; give the path of a new file")
