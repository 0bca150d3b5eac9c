"""An options class to command-line flags, and a command line to options."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from jetflow import configs
from jetflow.options import Options, expanded, kind_of, spelled
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

    @property
    def fields(self) -> dict[str, dataclasses.Field]:
        return {field.name: field for field in dataclasses.fields(self.options) if field.init}


def parse(command: Command, argv: Sequence[str]) -> Options:
    """The options that a command line gives; argv[0] names the command.

    Raises:
        UsageError: on what is unknown, missing, superfluous or of the wrong type.
    """
    fields = command.fields
    words, changes = _without_changes(argv) if "config" in fields else (list(argv), {})
    values = _define(command)
    try:
        rest = values(words)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown(error.flagname, command, argv[0])) from error
    except (flags.Error, ValueError) as error:
        raise UsageError(str(error)) from error
    if unexpected := rest[len(command.arguments) :]:
        raise UsageError(f"unexpected argument {unexpected[0]!r}; see `jetflow {argv[0]} --help`")
    texts = dict(zip(command.arguments, rest, strict=False))
    texts |= {name: values[name].value for name in values if name in fields}
    texts = {name: text for name, text in texts.items() if text is not None}
    if changes and "config" not in texts:
        raise UsageError(f"--config.{next(iter(changes))} changes a config; give --config FILE.py")
    for name in (*command.arguments, *fields):
        if name not in texts and fields[name].default is dataclasses.MISSING:
            label, example = _label(command, name), fields[name].metadata["example"]
            expected = command.usage if name in command.arguments else f"{label} {example}"
            raise UsageError(f"{label} is missing; expected {expected}")
    try:
        options = {name: _value(command.options, name, text) for name, text in texts.items()}
        for name, text in changes.items():
            configs.change(options["config"], name, text)
        return command.options(**options)
    except UsageError as error:
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"{_label(command, name)} {rest}") from error


def help_text(command: Command) -> str:
    """The usage, and a line for each argument and each flag; those that must be given first."""
    lines = []
    for name, field in sorted(command.fields.items()):
        default, text = field.default, field.metadata["help"] or CONFIG_HELP
        if choices := field.metadata["choices"]:
            text += f" ({', '.join(choices)})"
        if default is dataclasses.MISSING:
            text += " (required)"
        elif default not in (None, False, ()):
            several = isinstance(default, tuple)
            text += f" (default {','.join(map(str, default)) if several else default})"
        lines.append((default is not dataclasses.MISSING, f"  {_label(command, name)}: {text}"))
    return "\n".join([f"  {command.usage}", "", *(line for _, line in sorted(lines))])


def _define(command: Command) -> flags.FlagValues:
    """Flags whose values are texts; those of switches are true, false or None."""
    values = flags.FlagValues()
    if command.arguments:
        values.set_gnu_getopt(True)  # flags may follow what is given by its place
    special = {bool: flags.DEFINE_bool, Mapping: flags.DEFINE_multi_string}
    for name in command.fields.keys() - set(command.arguments):
        define = special.get(kind_of(command.options, name)[0], flags.DEFINE_string)
        define(name, None, "", flag_values=values)
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


def _value(options: type[Options], name: str, given: Any) -> Any:
    """What a flag's text stands for; `given` is a bool of a switch, texts of a repeated flag."""
    kind, _ = kind_of(options, name)
    if name == "config":
        return configs.read(given)
    if kind is Mapping:
        pairs = [text.partition("=") for text in given]
        if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[1])]:
            raise UsageError(f"{name} has {wrong[0]!r}; expected NAME=VALUE")
        return {key: value for key, _, value in pairs}
    if kind in (Path, epath.Path) and given.startswith("~"):
        given = str(expanded(name, given))
    return given if kind is bool else spelled(options, name, given)


def _unknown(name: str, command: Command, called: str) -> str:
    if name in configs.SECTIONS and "config" in command.fields:
        return f"--{name} is no flag; fields of the config are --config.{name}.…"
    nearest = difflib.get_close_matches(name, command.fields.keys() - set(command.arguments), n=1)
    hint = f"did you mean --{nearest[0]}? " if nearest else ""
    return f"--{name} is no flag of jetflow {called}; {hint}`jetflow {called} --help` lists them"


def _label(command: Command, name: str) -> str:
    """An option as the command line has it; anything else as it is."""
    if name not in command.fields:
        return name
    return name.upper() if name in command.arguments else f"--{name}"
