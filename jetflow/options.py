"""Options: what a command and the function behind it take, stated in one place.

A subclass of `Options` is a frozen dataclass. Its fields are made by `option`, each with a type, a
default, a range and a help text; `cli/flags.py` makes command-line flags of them.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jetflow.types import UsageError

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    least: int | float | None = None,
    most: int | float | None = None,
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
    """Checks its fields: type, choices and range.

    A whole number in the place of a float is made one, and a text a path where a path is expected.

    Raises:
        UsageError: on the first field that is wrong, with its name and what is expected.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind: Any = kind_of(type(self), field.name)[0]
            value = getattr(self, field.name)
            if kind is float and type(value) is int:
                value = float(value)
            elif kind is Path and isinstance(value, str):
                value = Path(value)
            object.__setattr__(self, field.name, value)
            _check(field, kind, value)

    def changed(self, *names: str) -> dict[str, Any]:
        """The values of some fields, by default of all, that are not as by default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if (not names or field.name in names) and getattr(self, field.name) != field.default
        }


def kind_of(options: type[Options], name: str) -> tuple[Any, bool]:
    """The type of a field, without None; of a tuple that of its items, and whether it is one."""
    kind = typing.get_type_hints(options)[name]
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    is_tuple = typing.get_origin(kind) is tuple
    return (typing.get_args(kind)[0] if is_tuple else kind), is_tuple


def _check(field: dataclasses.Field, kind: Any, value: Any) -> None:
    """Raise a UsageError unless a value, or each of several, is one that the field may have."""
    if (value is None and field.default is None) or not field.metadata:
        return
    for item in value if isinstance(value, tuple | list) else (value,):
        if not _is(item, kind):
            expected = KINDS.get(kind, str(kind))
        elif field.metadata["choices"] and item not in field.metadata["choices"]:
            expected = f"one of {', '.join(field.metadata['choices'])}"
        elif not _in_range(item, field.metadata["least"], field.metadata["most"]):
            least, most = (_text(field.metadata[end]) for end in ("least", "most"))
            expected = (
                f"{least} to {most}"
                if least and most
                else f"{least or most} or " + ("more" if least else "less")
            )
        else:
            continue
        raise UsageError(f"{field.name} is {item!r}; expected {expected}")


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_range(value: Any, least: int | float | None, most: int | float | None) -> bool:
    if least is None and most is None:
        return True
    return (-math.inf if least is None else least) <= value <= (math.inf if most is None else most)


def _text(bound: int | float | None) -> str:
    return "" if bound is None else f"{bound:g}" if isinstance(bound, float) else str(bound)
