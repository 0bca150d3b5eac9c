"""Files that readers find whole, also where several processes write the same one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jetflow.types import UsageError


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end; if the context fails, nothing changes.

    Its folder is made where there is none. Of several writers, each has a temporary file of its
    own, and the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not of `tempfile`, whose files no other user may read.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(field: str, path: Path | None) -> None:
    """Raise a UsageError if a file cannot be written there: before the work, not after it."""
    if path is None:
        return
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{field} {path} cannot be written; give the path of a new file")
