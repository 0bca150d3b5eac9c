"""Options: what a command and the function behind it take, stated in one place.

A subclass of `Options` is a frozen dataclass. Its fields are made by `option`, each with a type, a
default, a range and a help text; `cli/flags.py` makes command-line flags of them.
"""

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jetflow.buckets import AnyPath, as_path, is_bucket
from jetflow.types import UsageError

LARGEST = 2**31 - 1  # whole number, as arrays count
LARGEST_BATCH = 2**20  # images at a time
MOST_SAMPLES = 10**7
MOST_DRAWS = 10_000
MOST_WORKERS = 1000  # processes
DATA = "~/tensorflow_datasets"
LONGEST_NAME, LONGEST_PATH = 240, 3000  # bytes; file systems take 255 and 4095, ours add to them

BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    Path: f"a path of this machine, at most {LONGEST_PATH} bytes, names at most {LONGEST_NAME}",
    epath.Path: f"a path of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}",
}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    least: int | float = -math.inf,
    most: int | float = math.inf,
    example: str = "",
) -> Any:
    """A field of an `Options` class.

    Args:
        default: None for an option that may be left open; none at all for one that must be given.
        choices: the values that a text, or each of several, may have.
        least, most: the range of a number, or of each of several.
        example: of a value, for the message where the option is missing.
    """
    metadata = dict(help=help, choices=tuple(choices), least=least, most=most, example=example)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Checks its fields, as `checked` does: type, choices and range.

    Raises:
        UsageError: on the first field that is wrong, with its name and what is expected.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checked(type(self), field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def changed(self, *names: str) -> dict[str, Any]:
        """The values of some fields, by default of all, that are not as by default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if (not names or field.name in names) and getattr(self, field.name) != field.default
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFolders(Options):
    """Where the data sets are."""

    data_dir: AnyPath | None = option(
        None, "prepared data sets; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    )
    data_cache: Path | None = option(
        None, "a folder of this machine for data of a bucket; default: ~/.cache/jetflow/data"
    )

    @property
    def root(self) -> AnyPath:
        """The folder of all data sets: as given, or $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
        # TFDS has the same default, but reads the environment only once, at import.
        root = as_path(self.data_dir or os.environ.get("TFDS_DATA_DIR", DATA))
        return root if is_bucket(root) else expanded("data_dir", root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(DataFolders):
    """How data sets are read; those of a bucket are copied to each machine."""

    data_cache_gb: float | None = option(
        None, "most GB in data_cache; 0 reads from gs:// itself; default: all that fit", least=0.0
    )

    @property
    def data_fields(self) -> dict[str, Any]:
        """These fields, for functions that read data."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(DataOptions)}


def kind_of(options: type[Options], name: str) -> tuple[Any, bool]:
    """The type of a field, without None; of a tuple that of its items, and whether it is one."""
    return _item_kind(typing.get_type_hints(options)[name])


def _item_kind(kind: Any) -> tuple[Any, bool]:
    if isinstance(kind, types.UnionType):
        *_, kind = (part for part in typing.get_args(kind) if part is not type(None))
    is_tuple = typing.get_origin(kind) is tuple
    return (typing.get_args(kind)[0] if is_tuple else kind), is_tuple


def spelled(options: type[Options], name: str, text: str) -> Any:
    """The value of a field that a text spells; where several are expected, it has commas.

    Raises:
        UsageError: if the field cannot have it.
    """
    kind, is_tuple = kind_of(options, name)
    read = {int: int, float: float, bool: lambda part: BOOLS[part.lower()]}.get(kind, str)
    parts = [part.strip() for part in text.split(",") if part.strip()] if is_tuple else [text]
    try:
        values = tuple(map(read, parts))
    except (KeyError, ValueError) as error:
        raise UsageError(f"{name} is {text!r:.100}; expected {KINDS[kind]}") from error
    return checked(options, name, values if is_tuple else values[0])


def checked(options: type[Options], name: str, value: Any) -> Any:
    """The value of a field, of its type.

    A whole number in the place of a float is made one, a text a path where a path is expected, and
    one value a tuple where several are.

    Raises:
        UsageError: if the field cannot have it.
    """
    field = next(field for field in dataclasses.fields(options) if field.name == name)
    return checked_value(name, field, typing.get_type_hints(options)[name], value)


def checked_value(name: str, field: dataclasses.Field, kind: Any, value: Any) -> Any:
    """As `checked`, for a value of any name: of a type, such as tuple[int, ...], in a range."""
    if not field.metadata or (value is None and field.default is None):
        return value
    kind, is_tuple = _item_kind(kind)
    if not is_tuple:
        return _item(name, field, kind, value)
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not items and field.default != ():
        raise UsageError(f"{name} is empty; expected one or more, separated by commas")
    return tuple(_item(name, field, kind, item) for item in items)


def _item(name: str, field: dataclasses.Field, kind: Any, value: Any) -> Any:
    choices, least, most = (field.metadata[key] for key in ("choices", "least", "most"))
    top = LARGEST if kind is int and most == math.inf else most
    if value == "" == field.default:
        return value
    if value == "":
        expected = f"{KINDS.get(kind, str(kind)).partition(' of ')[0]} that is not empty"
    elif not _is(value, kind):
        expected = KINDS.get(kind, str(kind))
    elif choices and value not in choices:
        expected = f"one of {', '.join(choices)}"
    elif kind in (int, float) and not least <= value <= top:
        expected = _range(least, top if value > least else most)
    else:
        return {float: float, Path: as_path, epath.Path: as_path}.get(kind, lambda v: v)(value)
    raise UsageError(f"{name} is {value!r:.100}; expected {expected}")


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if kind in (Path, epath.Path):
        is_path = isinstance(value, str | os.PathLike) and _is_path(os.fspath(value))
        return is_path and (kind is epath.Path or not is_bucket(as_path(value)))
    return isinstance(value, kind)


def _is_path(text: str) -> bool:
    names = [len(os.fsencode(part)) for part in Path(text).parts]
    is_short = max(names, default=0) <= LONGEST_NAME and len(os.fsencode(text)) <= LONGEST_PATH
    return is_short and "\0" not in text


def expanded(name: str, path: str | os.PathLike) -> Path:
    """The path that an option gives, with ~ for the home directory.

    Raises:
        UsageError: if there is no such directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{name} is {os.fspath(path)!r}, but no home directory is known; give a path without ~"
        ) from error


def default_archives(root: AnyPath) -> Path:
    """The folder of archives by default, which is one of this machine."""
    folder = expanded("data_dir", DATA) if is_bucket(root) else root
    return Path(folder / "downloads" / "manual").absolute()


def _range(least: int | float, most: int | float) -> str:
    low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (least, most))
    if math.isinf(most):
        return f"{low} or more"
    return f"{high} or less" if math.isinf(least) else f"{low} to {high}"
