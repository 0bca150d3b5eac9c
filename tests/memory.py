"""The memory that a part of a test takes at most, where the system tells."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

LIMIT = 1.2e9  # bytes, beside what the process had before


@contextlib.contextmanager
def bounded(limit: float = LIMIT) -> Iterator[None]:
    """Fails if the process has at any time taken more bytes than this inside."""
    before = _reset()
    yield
    assert _bytes("VmHWM") - before < limit


def _reset() -> int:
    """Forget the largest size so far, and give the present one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _bytes("VmHWM")


def _bytes(field: str) -> int:
    status = Path("/proc/self/status")
    match = re.search(rf"{field}:\s*([0-9]+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(match[1]) if match else 0
