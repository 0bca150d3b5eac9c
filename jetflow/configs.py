"""Config files, named as `FILE.py` or `FILE.py:ARGUMENT`, and changes of single fields by name."""

import ast
import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jetflow.types import Config, UsageError

SECTIONS = ("flow", "data", "noise", "optim", "train", "mesh", "eval")
FIELDS = ("init_from", "init_weights")  # that belong to no section
MOST_SHOWN = 4  # fields that differ
_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "values in brackets, such as (1, 2) or ('a', 'b')",
}


def read(name: str) -> Config:
    """The config that a file's `get_config` returns; what follows a colon is its argument.

    A config file can import its neighbours, as in `from configs import base`: the folder above its
    own joins the search path, and the current one after it.

    Raises:
        UsageError: if the file is missing or fails (with the line), or its config lacks a section.
    """
    path, colon, argument = name.partition(":")
    folders = [str(Path(path).resolve().parent.parent), os.getcwd()]
    sys.path[:] = [*folders, *(folder for folder in sys.path if folder not in folders)]
    config = call("config", path, "get_config", *([argument] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config {path} has a get_config that returns no config")
    if missing := [part for part in (*SECTIONS, *FIELDS) if part not in config]:
        kind = "section" if missing[0] in SECTIONS else "field"
        raise UsageError(
            f"--config {path} has no {kind} {missing[0]}; start from configs/base.py, which has "
            f"{', '.join((*SECTIONS, *FIELDS))}"
        )
    return config


def call(flag: str, path: str, function: str, *arguments: str) -> Any:
    """The result of a function of a Python file that a flag names.

    Raises:
        UsageError: if the file is missing, lacks the function, or fails (with the line).
    """
    if not Path(path).is_file():
        raise UsageError(f"--{flag} {path!r} is no file; expected one such as configs/NAME.py")
    try:
        defined = runpy.run_path(path)
        if function in defined:
            return defined[function](*arguments)
    except Exception as error:  # whatever the file raises
        raise UsageError(_failure(error, path, f"--{flag} {path}")) from error
    raise UsageError(f"--{flag} {path} has no function {function}; configs/ has examples")


def change(config: Config, name: str, value: Any) -> None:
    """Set a field, such as "train.steps", to a value of its type, or to a text that spells one.

    Raises:
        UsageError: if there is no such field, or the value is of another type.
    """
    part, section = "", config
    present: Any = config
    for part in name.split("."):
        known = list(present) if isinstance(present, ConfigDict) else []
        if part not in known:
            nearest = difflib.get_close_matches(part, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "configs/base.py lists them"
            raise UsageError(f"config.{name} is no field of the config; {remedy}")
        section, present = present, present[part]
    if isinstance(present, ConfigDict):
        raise UsageError(f"config.{name} is {value!r}; expected the name of a field after it")
    try:
        section[part] = _parsed(str(value), type(present))
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        expected = _EXPECTED.get(type(present), type(present).__name__)
        raise UsageError(f"config.{name} is {value!r}; expected {expected}") from error


def _parsed(text: str, kind: type) -> Any:
    if kind is bool:
        return _BOOLS[text.lower()]
    if kind is not tuple:
        return kind(text)
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _failure(error: Exception, path: str, file: str) -> str:
    """What went wrong in a file, and in which line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    line = lines[-1] if lines else getattr(error, "lineno", None)  # which a SyntaxError has
    where = file + (f", line {line}" if line else "")
    if isinstance(error, ModuleNotFoundError) and error.name == "configs":
        return (
            f"{where}: `configs` was not found; run from a clone of jetflow, or put the file in "
            "its configs/"
        )
    text = " ".join(str(error).replace("\\n", " ").split())
    return f"{where}: {type(error).__name__}: {text}"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of dicts by their names, such as "optim.lr"."""
    leaves = {}
    for key, node in tree.items():
        name = f"{prefix}{key}"
        leaves |= flat(node, f"{name}.") if isinstance(node, dict) else {name: node}
    return leaves


def differences(
    old: dict[str, Any], new: dict[str, Any], free: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The fields of two trees that differ, with both values, except `free` ones and those below.

    What the data resolved to counts only where the old tree has it: version 0.1 recorded less.
    """
    old, new = flat(old), flat(new)
    return {
        name: (old.get(name, "absent"), new.get(name, "absent"))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
        and not any(f"{name}.".startswith(f"{field}.") for field in free)
        and (name in old or not name.startswith("resolved."))
    }


def shown(differing: dict[str, tuple[Any, Any]], prefix: str = "config.") -> str:
    """Differences for a person: the first ones, and the number of the others."""
    texts = [
        f"{prefix}{name} is {old} there and {new} here" for name, (old, new) in differing.items()
    ]
    more = [f"and {len(texts) - MOST_SHOWN} more"] if len(texts) > MOST_SHOWN else []
    return ", ".join(texts[:MOST_SHOWN] + more)
