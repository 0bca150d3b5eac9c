"""Config files on the command line: `--config FILE.py[:arg]` and `--config.section.field=value`."""

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


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define --config; its overrides are looked for in `argv`.

    A config file can import its neighbours, as `from configs import base`: the folder above its
    own joins the search path.
    """
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a config file, FILE.py or FILE.py:ARGUMENT; --config.SECTION.FIELD=VALUE overrides",
        flag_values=values,
        sys_argv=list(argv),
    )
    if path := _path(argv):
        sys.path.insert(0, str(Path(path).resolve().parent.parent))


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse a command line and its config; returns what is left of it.

    Raises:
        UsageError: on an unknown flag or field, with the nearest name, on a wrong type, and on a
            config file that is missing or fails.
    """
    path = _path(argv) if "config" in values else None
    if path and not Path(path).is_file():
        raise UsageError(f"--config {path} is no file; expected one such as configs/NAME.py")
    try:
        rest = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        message = str(error).replace(" ?", "?")
        raise UsageError(f"{message}; see `jetflow {argv[0]} --help`") from error
    except flags.Error as error:
        raise UsageError(_last_error(str(error))) from error
    except Exception as error:  # whatever a config file raises, or ml_collections of an override
        raise UsageError(_failure(error, path, argv)) from error
    if path:
        _check_sections(values["config"].value, path)
    return rest


def _path(argv: Sequence[str]) -> str | None:
    """The config file that a command line names."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name in ("-config", "--config"):
            return (value or following).partition(":")[0]
    return None


def _failure(error: Exception, path: str | None, argv: Sequence[str]) -> str:
    """What went wrong, and where: in an override, or in the config file."""
    text = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
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
    if nearest:
        return f"{where}: the config has no field {unknown}; {remedy}"
    return f"{where}: {type(error).__name__}: {text}"


def _check_sections(config: Any, path: str) -> None:
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config {path} has a get_config that returns no config")
    for section in SECTIONS:
        if section not in config:
            raise UsageError(
                f"--config {path} has no section {section}; start from configs/base.py, which has "
                f"{', '.join(SECTIONS)}"
            )


def _last_error(text: str) -> str:
    """An error as one line; of a traceback, where it was raised and what was."""
    head, traceback_, tail = text.partition("Traceback (most recent call last):")
    lines = [line for line in (tail if traceback_ else head).splitlines() if line.strip()]
    if traceback_:
        places = [line.strip() for line in lines if line.startswith("  File ")]
        errors = [line for line in lines if not line.startswith(" ")]
        lines = [head.splitlines()[0], places[-1].replace("File ", "in ", 1), *errors]
    return " ".join(line.strip() for line in lines)
