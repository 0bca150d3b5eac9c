"""Config files on the command line: `--config FILE.py[:arg]` and `--config.section.field=value`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from absl import flags
from ml_collections import config_flags

from jetflow.types import UsageError

Config: TypeAlias = Any  # an ml_collections ConfigDict: sections of fields, as configs/base.py has


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
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            folder = Path((value or following).partition(":")[0]).resolve().parent.parent
            sys.path.insert(0, str(folder))


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse a command line and its config; returns what is left of it.

    Raises:
        UsageError: on an unknown flag or field, with the nearest name, and on a wrong type.
    """
    try:
        rest = values(list(argv))[1:]
        if "config" in values:
            values["config"].value  # noqa: B018 — a file that cannot be read says so only now
        return rest
    except flags.UnrecognizedFlagError as error:
        message = str(error).replace(" ?", "?")
        raise UsageError(f"{message}; see `jetflow {argv[0]} --help`") from error
    except flags.Error as error:
        raise UsageError(_last_error(str(error))) from error
    except AttributeError as error:  # ml_collections, of a field that the config does not have
        field, _, hint = str(error).partition("\n")
        field = field.strip("'\"")
        given = [a.partition("=")[0] for a in argv if a.partition("=")[0].endswith(f".{field}")]
        raise UsageError(f"the config has no field {' '.join(given) or field}. {hint}") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"--config cannot be read: {reason}") from error


def _last_error(text: str) -> str:
    """An error as one line; of a traceback, where it was raised and what was."""
    head, traceback, tail = text.partition("Traceback (most recent call last):")
    lines = [line for line in (tail if traceback else head).splitlines() if line.strip()]
    if traceback:
        places = [line.strip() for line in lines if line.startswith("  File ")]
        errors = [line for line in lines if not line.startswith(" ")]
        lines = [head.splitlines()[0], places[-1].replace("File ", "in ", 1), *errors]
    return " ".join(line.strip() for line in lines)
