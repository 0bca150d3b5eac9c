"""NumPy's .npz files: what is needed of them is read, and checked before memory is taken for it."""

import contextlib
import io
import json
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from jetflow.buckets import AnyPath, raise_refusal
from jetflow.types import UsageError

ROOM = 2**28  # bytes by which arrays that are read may exceed their compressed file
START = 2**14  # bytes; the description of an array is shorter
BLOCK = 2**20
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others cannot be read in small parts

Shape = tuple[int | None, ...]


class Npz:
    """The arrays of an .npz by their `names`; "name in file" says whether there is one.

    Args:
        path: the file.
        option: what it was given as, for messages.
        expected: what it should be, for messages.

    Raises:
        UsageError: also of all methods, on a file that is damaged or has other arrays.
    """

    def __init__(self, path: AnyPath, option: str, expected: str):
        self._path, self._file, self._expected = path, f"{option} {path}", expected
        with self._reading(""):
            if not path.is_file():  # a device may have no end
                raise ValueError("it is no file")
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
            self._left = epath.Path(path).stat().length + ROOM
        self._entries = {
            name.removesuffix(".npy"): entry
            for name, entry in entries.items()
            if name.endswith(".npy")
        }
        self.names = list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def fault(self, reason: str) -> UsageError:
        """The error, in one line, for a file whose content is not as it should be."""
        reason = "".join(filter(str.isprintable, " ".join(reason.split())))[:200]
        return UsageError(f"{self._file} cannot be read ({reason}); expected {self._expected}")

    def shape(self, name: str, types: str = "", shape: Shape | None = None) -> tuple[int, ...]:
        """The shape of an array, which its size in the file bears out.

        Args:
            types: letters of those that it may have, see `numpy.dtype.char`; default: all.
            shape: that it must have, with None for any number; default: any.
        """
        found, _, dtype, _ = self._head(name)
        matches = shape is None or (
            len(found) == len(shape)
            and all(wanted in (None, n) for wanted, n in zip(shape, found, strict=True))
        )
        if not matches or (types and dtype.char not in types):
            wanted = [str(np.dtype(letter)) for letter in types[:1]]
            wanted += [] if shape is None else [str(list(shape)).replace("None", "N")]
            raise self.fault(f"{name} is {dtype} {list(found)}, not {' '.join(wanted)}")
        return found

    def array(self, name: str, types: str = "", shape: Shape | None = None) -> np.ndarray:
        """An array, read whole; arguments as of `shape`."""
        self.shape(name, types, shape)
        self._left -= self._entries[name].file_size
        if self._left < 0:
            raise self.fault(f"{name} takes far more bytes than the whole file")
        with self._reading(name), self._open(name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def facts(self, name: str) -> dict[str, Any]:
        """The JSON that a text of this name holds."""
        text = str(self.array(name, "U", ()))
        with self._reading(name):
            facts = json.loads(text)
            if not isinstance(facts, dict):
                raise ValueError(f"a {type(facts).__name__}, not a dict")
        return facts

    def verify(self, name: str) -> None:
        """Read an array once in small parts, which compares it with its checksum."""
        with self._reading(name), self._open(name) as file:
            while file.read(BLOCK):
                pass

    def rows(self, name: str, count: int) -> Iterator[np.ndarray]:
        """An array in parts of at most so many rows."""
        shape, is_fortran, dtype, start = self._head(name)
        with self._reading(name), self._open(name) as file:
            if is_fortran:
                raise ValueError("its rows do not lie one after another")
            file.read(start)
            for first in range(0, shape[0], count):
                part = (min(count, shape[0] - first), *shape[1:])
                content = file.read(dtype.itemsize * math.prod(part))
                yield np.frombuffer(content, dtype).reshape(part)

    def _head(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        """Shape, whether columns lie one after another, type, and the bytes before the values."""
        if name not in self:
            raise self.fault(f"it has no {name}")
        with self._reading(name), self._open(name) as file:
            start = io.BytesIO(file.read(START))
            version = np.lib.format.read_magic(start)
            if version not in HEADERS:
                raise ValueError(f"version {version} of the format")
            shape, is_fortran, dtype = HEADERS[version](start)
            size, stored = dtype.itemsize * math.prod(shape), self._entries[name].file_size
            if dtype.hasobject or min(shape, default=0) < 0 or start.tell() + size != stored:
                raise ValueError(f"{stored:,} bytes for {dtype} {list(shape)}")
        return shape, is_fortran, dtype, start.tell()

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        entry = self._entries[name]
        if entry.compress_type not in METHODS:
            raise ValueError(f"compressed by method {entry.compress_type}")
        with (
            self._path.open("rb") as whole,
            zipfile.ZipFile(whole) as archive,
            archive.open(entry) as file,
        ):
            yield file

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """A damaged file raises errors of many types."""
        try:
            yield
        except Exception as error:
            raise_refusal(error)
            reason = str(error) or type(error).__name__
            raise self.fault(f"{name}: {reason}" if name else reason) from error
