"""An options class to command-line flags, and a command line to options."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jetflow import configs
from jetflow.options import KINDS, Options, kind_of
from jetflow.types import UsageError

CONFIG_HELP = "FILE.py or FILE.py:ARGUMENT; --config.SECTION.FIELD=VALUE changes a field"


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
    fields = _fields(command)
    words, changes = _without_changes(argv) if "config" in fields else (list(argv), {})
    values = _define(command)
    try:
        rest = values(words)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown(error.flagname, command, argv[0])) from error
    except flags.Error as error:
        raise UsageError(str(error)) from error
    if unexpected := rest[len(command.arguments) :]:
        raise UsageError(f"unexpected argument {unexpected[0]!r}; see `jetflow {argv[0]} --help`")
    if missing := command.arguments[len(rest) :]:
        raise UsageError(f"{missing[0].upper()} is missing; expected {command.usage}")
    texts = dict(zip(command.arguments, rest, strict=True))
    texts |= {name: values[name].value for name in values if name in fields}
    options = {
        name: _parsed(command, name, text) for name, text in texts.items() if text is not None
    }
    if changes and "config" not in options:
        raise UsageError(f"--config.{next(iter(changes))} changes a config; give --config FILE.py")
    for name, field in fields.items():
        if name not in options and field.default is dataclasses.MISSING:
            example = field.metadata["example"]
            raise UsageError(f"--{name} is missing; expected --{name} {example}")
    for name, text in changes.items():
        configs.change(options["config"], name, text)
    try:
        return command.options(**options)
    except UsageError as error:
        is_flag = str(error).split()[0] in fields
        raise UsageError(f"--{error}" if is_flag else str(error)) from error


def help_text(command: Command) -> str:
    """The usage, and a line for each flag."""
    lines = []
    for name, field in sorted(_fields(command).items()):
        if name not in command.arguments:
            choices = field.metadata["choices"]
            text = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
            shown = field.default not in (dataclasses.MISSING, None, False, ())
            default = f" (default {_as_text(field.default)})" if shown else ""
            lines.append(f"  --{name}: {text or CONFIG_HELP}{default}")
    return "\n".join([f"  {command.usage}", "", *lines])


def _fields(command: Command) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(command.options)}


def _define(command: Command) -> flags.FlagValues:
    """Flags whose values are texts; those of switches are true, false or None."""
    values = flags.FlagValues()
    if command.arguments:
        values.set_gnu_getopt(True)  # flags may follow what is given by its place
    for name, field in _fields(command).items():
        if name not in command.arguments:
            kind = kind_of(command.options, name)[0]
            special = {bool: flags.DEFINE_bool, Mapping: flags.DEFINE_multi_string}
            define = special.get(kind, flags.DEFINE_string)
            define(name, None, field.metadata["help"], flag_values=values)
    return values


def _without_changes(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command line without its --config.SECTION.FIELD=VALUE, and these: the last one counts."""
    words, changes = [], {}
    pending = list(argv)
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith(("--config.", "-config.")):
            words.append(word)
            continue
        if not equals:  # the value is the next word, or true for a switch
            value = "true" if not pending or pending[0].startswith("--") else pending.pop(0)
        changes[name.partition(".")[2]] = value
    return words, changes


def _parsed(command: Command, name: str, text: Any) -> Any:
    """A text to a value, or a text with commas to several."""
    kind, is_tuple = kind_of(command.options, name)
    if name == "config":
        return configs.read(text)
    if kind is bool:
        return text
    if kind is Mapping:  # a flag that may be given again
        if wrong := [part for part in text if not re.match("[^=]+=", part)]:
            raise UsageError(f"--{name} has {wrong[0]!r}; expected NAME=VALUE")
        return dict(part.split("=", 1) for part in text)
    convert = (lambda part: Path(part).expanduser()) if kind is Path else kind
    try:
        if is_tuple:
            return tuple(convert(part.strip()) for part in text.split(",") if part.strip())
        return convert(text)
    except ValueError as error:
        raise UsageError(f"--{name} is {text!r}; expected {KINDS[kind]}") from error


def _unknown(name: str, command: Command, called: str) -> str:
    if name in configs.SECTIONS and "config" in _fields(command):
        return f"--{name} is no flag; fields of the config are --config.{name}.…"
    nearest = difflib.get_close_matches(name, _fields(command), n=1)
    hint = f"did you mean --{nearest[0]}? " if nearest else ""
    return f"--{name} is no flag of jetflow {called}; {hint}`jetflow {called} --help` lists them"


def _as_text(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
