"""Config files on the command line: `--config FILE.py[:arg]` and `--config.section.field=value`."""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from absl import flags
from ml_collections import ConfigDict, config_flags

from jetflow.types import UsageError

Config: TypeAlias = Any  # an ml_collections ConfigDict: sections of fields, as configs/base.py has

SECTIONS = ("flow", "data", "noise", "optim", "train", "mesh", "eval")
FIELDS = ("init_from", "init_weights")  # that belong to no section
_KINDS = {  # part of what absl says of a value of the wrong type -> what was expected
    "int()": "a whole number",
    "to float": "a number",
    "boolean flag": "true or false",
    "as a ConfigDict": "the name of a field after it",
}


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define --config; its overrides are looked for in `argv`.

    A config file can import its neighbours, as `from configs import base`: the folder above its
    own joins the search path, and the current one after it.
    """
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a config file, FILE.py or FILE.py:ARGUMENT; --config.SECTION.FIELD=VALUE overrides",
        flag_values=values,
        sys_argv=list(argv),
    )
    if path := _path(argv):
        sys.path[:0] = [str(Path(path).resolve().parent.parent), os.getcwd()]


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse a command line and its config; returns what is left of it.

    Raises:
        UsageError: on an unknown flag or field, with the nearest name, on a wrong type, and on a
            config file that is missing or fails.
    """
    path = _path(argv) if "config" in values else None
    if path is not None and not Path(path).is_file():
        raise UsageError(f"--config {path!r} is no file; expected one such as configs/NAME.py")
    try:
        rest = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        message = str(error).replace(" ?", "?")
        name = re.match(r"Unknown command line flag '(\w+)\.", message)
        if name and name[1] in SECTIONS:
            message = f"{message}; fields of the config are --config.{name[1]}.…"
        raise UsageError(f"{message}; see `jetflow {argv[0]} --help`") from error
    except Exception as error:  # absl's and ml_collections', and whatever a config file raises
        raise UsageError(_failure(error, path, argv)) from error
    if path:
        _check_sections(values["config"].value, path)
    return rest


def _path(argv: Sequence[str]) -> str | None:
    """The config file that a command line names."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, separator, value = argument.partition("=")
        if name in ("-config", "--config"):
            return (value if separator else following).partition(":")[0]
    return None


def _failure(error: BaseException, path: str | None, argv: Sequence[str]) -> str:
    """What went wrong, and where: in a flag, an override, or the config file."""
    while "Error whilst parsing config file" in str(error):
        error = error.__cause__ or error.__context__ or Exception(path)
    text = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
    if value := re.fullmatch(r"flag --(\S+?)=(.*?): (.*)", text):
        field, given, reason = value.groups()
        expected = next((kind for sign, kind in _KINDS.items() if sign in reason), None)
        name = field if field.startswith("config.") else f"--{field}"
        return f"{name} is {given!r}; expected {expected}" if expected else text
    if isinstance(error, flags.Error):
        return text

    nearest = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
    unknown = nearest[2] if nearest else text.strip("'\"")
    remedy = f"did you mean {nearest[1]}?" if nearest else "configs/base.py lists the fields"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    for name in (argument.lstrip("-").partition("=")[0] for argument in argv):
        if not lines and unknown in name.split(".")[1:]:
            return f"{name} is no field of the config; {remedy}"
    lines = lines or [getattr(error, "lineno", None)]  # which a SyntaxError has
    where = f"--config {path}" + (f", line {lines[-1]}" if lines[-1] else "")
    if isinstance(error, ModuleNotFoundError) and error.name == "configs":
        return (
            f"{where}: `configs` was not found; run from a clone of jetflow, or put the file in "
            "its configs/"
        )
    if isinstance(error, AttributeError) and "'get_config'" in text:
        return f"--config {path} has no function get_config; see configs/digits_tarflow.py"
    if nearest:
        return f"{where}: the config has no field {unknown}; {remedy}"
    return f"{where}: {type(error).__name__}: {text}"


def _check_sections(config: Any, path: str) -> None:
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config {path} has a get_config that returns no config")
    for name in (*SECTIONS, *FIELDS):
        if name not in config:
            kind = "section" if name in SECTIONS else "field"
            raise UsageError(
                f"--config {path} has no {kind} {name}; start from configs/base.py, which has "
                f"{', '.join((*SECTIONS, *FIELDS))}"
            )
