"""An options class to command-line flags, and a command line to options."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jetflow.cli import configs
from jetflow.options import KINDS, Options, kind_of
from jetflow.types import UsageError


class Command(NamedTuple):
    """A command of `jetflow`.

    Attributes:
        usage: an example.
        options: the class of its options. A field `config` is a config file with its overrides.
        run: does the work; returns the exit status, or None for 0.
        arguments: the options that are given by their place, without a flag.
    """

    usage: str
    options: type[Options]
    run: Callable[[Any], int | None]
    arguments: tuple[str, ...] = ()


def parse(command: Command, argv: Sequence[str]) -> Options:
    """The options that a command line gives; argv[0] names the command.

    Raises:
        UsageError: on what is unknown, missing, superfluous or of the wrong type.
    """
    values = _define(command, argv)
    rest = configs.parse(values, argv)
    if unexpected := rest[len(command.arguments) :]:
        raise UsageError(f"unexpected argument {unexpected[0]!r}; see `jetflow {argv[0]} --help`")
    if missing := command.arguments[len(rest) :]:
        raise UsageError(f"{missing[0].upper()} is missing; expected {command.usage}")
    given = {name: values[name].value for name in values if name in _fields(command)}
    given |= {
        name: kind_of(command.options, name)[0](text)
        for name, text in zip(command.arguments, rest, strict=True)
    }
    for name, field in _fields(command).items():
        if given[name] is None and field.default is dataclasses.MISSING:
            example = field.metadata["example"]
            raise UsageError(f"--{name} is missing; expected --{name} {example}")
    return command.options(**given)


def help_text(command: Command, argv: Sequence[str]) -> str:
    """The usage, and a line for each flag."""
    values = _define(command, argv)
    names = sorted({values[name].name for name in values})
    lines = [f"  --{name}: {values[name].help}{_default(values[name])}" for name in names]
    return "\n".join([f"  {command.usage}", "", *lines])


def _fields(command: Command) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(command.options)}


def _define(command: Command, argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    if command.arguments:
        values.set_gnu_getopt(True)  # flags may follow what is given by its place
    for name, field in _fields(command).items():
        if name == "config":
            configs.define(values, argv)
        elif name not in command.arguments:
            _define_flag(values, command.options, field)
    return values


def _define_flag(
    values: flags.FlagValues, options: type[Options], field: dataclasses.Field
) -> None:
    kind, is_tuple = kind_of(options, field.name)
    text, choices = field.metadata["help"], field.metadata["choices"]
    if choices:
        text = f"{text} ({', '.join(choices)})"
    default = None if field.default is dataclasses.MISSING else field.default
    if kind is bool:
        flags.DEFINE_bool(field.name, default, text, flag_values=values)
        return
    serializer = flags.ListSerializer(",") if is_tuple else flags.ArgumentSerializer()
    flags.DEFINE(_Parser(kind, is_tuple), field.name, default, text, values, serializer)


class _Parser(flags.ArgumentParser):
    """A text to a value, or a text with commas to several."""

    def __init__(self, kind: type, is_tuple: bool):
        self._kind, self._is_tuple = kind, is_tuple

    def flag_type(self) -> str:
        return self._kind.__name__

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument  # a default
        if self._is_tuple:
            return tuple(self._value(part.strip()) for part in argument.split(",") if part.strip())
        return self._value(argument)

    def _value(self, text: str) -> Any:
        try:
            return Path(text).expanduser() if self._kind is Path else self._kind(text)
        except ValueError as error:
            raise ValueError(f"expected {KINDS[self._kind]}") from error


def _default(flag: flags.Flag) -> str:
    silent = flag.default is None or flag.default is False or flag.default == ()
    return "" if silent else f" (default {flag.default_as_str})"
