"""Config files, named as `FILE.py` or `FILE.py:ARGUMENT`, and changes of single fields by name."""

import ast
import contextlib
import difflib
import inspect
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jetflow import sharding
from jetflow.buckets import AnyPath
from jetflow.noise import LARGEST_SEED
from jetflow.options import (
    BOOLS,
    LARGEST_BATCH,
    MOST_DRAWS,
    MOST_WORKERS,
    checked_value,
    option,
)
from jetflow.types import Config, UsageError

SECTIONS = ("flow", "data", "noise", "optim", "train", "mesh", "eval")
FIELDS = ("init_from", "init_weights")  # that belong to no section
SHIPPED = "jetflow://"  # before a path such as configs/base.py, of the installed package
LARGEST_WIDTH = 2**20
MOST_LAYERS = 1000  # of a kind
MOST_PICTURES = 2**16
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "values in brackets, such as (1, 2) or ('a', 'b')",
}


def read(name: str) -> Config:
    """The config that a file's `get_config` returns; what follows a colon is its argument.

    A config file can import its neighbours, as in `from configs import base`: the folder above its
    own joins the search path, and the current one after it. `jetflow://configs/FILE.py` is one of
    those that are installed with the package.

    Raises:
        UsageError: if the file is missing or fails (with the line), or its config lacks a section.
    """
    path, colon, argument = located(name).partition(":")
    folders = [str(Path(path).absolute().parent.parent), os.getcwd()]
    sys.path[:] = [*folders, *(folder for folder in sys.path if folder not in folders)]
    config = call("config", path, "get_config", *([argument] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config {path} has a get_config that returns no config")
    for part in (*SECTIONS, *FIELDS):
        if not isinstance(config.get(part), ConfigDict if part in SECTIONS else str):
            kind = "section" if part in SECTIONS else "text"
            raise UsageError(
                f"--config {path} has no {kind} {part}; start from configs/base.py, which has "
                f"{', '.join((*SECTIONS, *FIELDS))}"
            )
    return config


def located(name: str) -> str:
    """The path of a file, with that of the installed package in the place of `jetflow://`."""
    folder = f"{Path(__file__).parent / 'shipped'}{os.sep}"
    return folder + name.removeprefix(SHIPPED) if name.startswith(SHIPPED) else name


def call(flag: str, path: str, function: str, *arguments: str) -> Any:
    """The result of a function of a Python file that a flag names.

    Raises:
        UsageError: if the file is missing, lacks the function, does not take the arguments, or
            fails (with the line).
    """
    if not os.path.isfile(path):
        raise UsageError(f"--{flag} {path!r} is no file; {_nearest(path)}")
    try:
        called = runpy.run_path(path).get(function)
        if not callable(called):
            raise UsageError(f"--{flag} {path} has no function {function}; configs/ has examples")
        _check_arguments(called, arguments, f"--{flag} {path}")
        return called(*arguments)
    except (KeyboardInterrupt, UsageError):
        raise
    except BaseException as error:  # whatever the file raises, also to end the process
        raise UsageError(_failure(error, path, f"--{flag} {path}")) from error


def _nearest(path: str) -> str:
    """A remedy for the name of a file that is missing: one beside it with a name like it."""
    folder, name = os.path.split(path)
    with contextlib.suppress(OSError, ValueError):
        names = [each for each in os.listdir(folder or ".") if name and each.endswith(".py")]
        if near := difflib.get_close_matches(f"{name.removesuffix('.py')}.py", names, n=1):
            return f"did you mean {os.path.join(folder, near[0])}?"
    return "expected one such as configs/NAME.py"


def _check_arguments(called: Callable[..., Any], arguments: Sequence[str], file: str) -> None:
    """Raise a UsageError unless a function takes what a colon gives it."""
    try:
        inspect.signature(called).bind(*arguments)
    except TypeError as error:
        remedy = f"leave out :{arguments[0]}" if arguments else f"give one as {file}:ARGUMENT"
        raise UsageError(
            f"{file} takes {'no' if arguments else 'an'} argument; {remedy}"
        ) from error


def change(config: Config, name: str, value: Any) -> None:
    """Set a field, such as "train.steps", to a value of its type, or to a text that spells one.

    Raises:
        UsageError: if there is no such field, or the value is of another type.
    """
    part, section = "", config
    present: Any = config
    for part in name.split("."):
        known = list(present) if isinstance(present, ConfigDict) else []
        known = [field for field in known if field != "defaults"]
        if part not in known:
            nearest = difflib.get_close_matches(part, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "configs/base.py lists them"
            raise UsageError(f"config.{name} is no field of the config; {remedy}")
        section, present = present, present[part]
    if isinstance(present, ConfigDict):
        raise UsageError(f"config.{name} is {value!r:.100}; expected the name of a field after it")
    try:
        section[part] = _parsed(str(value), type(present))
    except (KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        expected = _EXPECTED.get(type(present), type(present).__name__)
        raise UsageError(f"config.{name} is {value!r:.100}; expected {expected}") from error


# (type, range) -> the fields that must be so; a kind of flow has only some of its fields
_TYPES: tuple[tuple[Any, Any, str], ...] = (
    (int, option(least=1), "train.accumulation train.log_every train.checkpoint_every "
        "train.keep_checkpoints"),
    (int, option(least=0), "train.steps train.epochs train.images train.eval_every "
        "train.sample_every train.keep_every"),
    (int, option(least=1, most=LARGEST_BATCH), "train.batch_size eval.batch_size"),
    (int, option(least=1, most=MOST_DRAWS), "eval.draws"),
    (int, option(least=1, most=MOST_PICTURES), "eval.samples"),
    (int, option(least=0, most=LARGEST_SEED), "train.seed"),
    (int, option(least=0, most=MOST_WORKERS), "data.workers"),
    (int, option(least=-1), "mesh.data mesh.fsdp mesh.tensor"),
    (int, option(least=1, most=MOST_LAYERS), "flow.num_couplings flow.block_depth flow.num_blocks"),
    (int, option(least=1, most=LARGEST_WIDTH), "flow.patch_size flow.width flow.head_dim "
        "flow.num_heads"),
    (float, option(least=0.0), "optim.min_lr optim.weight_decay optim.clip_norm noise.std "
        "noise.t0 noise.t1"),
    (float, option(least=1e-30), "optim.lr optim.eps flow.pixel_scale"),
    (float, option(least=1.001), "flow.scale_factor"),
    (float, option(least=0.0, most=0.999999), "train.ema_decay optim.b1 optim.b2 noise.label_drop"),
    (bool, option(), "data.labels noise.flip flow.noise_conditional"),
    (str, option(), "data.name data.train_split data.test_split"),
    (AnyPath, option(""), "init_from"),
    (str, option(choices=("auto", "ema", "params")), "init_weights"),
    (tuple[int, ...], option(least=1, most=MOST_LAYERS), "flow.layers_per_block"),
    (tuple[str, ...], option(choices=("channels", "spatial")), "flow.kinds"),
)  # fmt: skip


def check(config: Config) -> None:
    """Raise a UsageError unless each field is there, of its type and in its range."""
    for kind, limits, names in _TYPES:
        for name in names.split():
            section, _, field = name.rpartition(".")
            fields = config[section] if section else config
            if field in fields or section != "flow":
                checked_value(f"config.{name}", limits, kind, fields.get(field))
    sharding.check_rules(config.mesh.rules)


def _parsed(text: str, kind: type) -> Any:
    if kind is bool:
        return BOOLS[text.lower()]
    if kind is not tuple:
        return kind(text)
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _failure(error: BaseException, path: str, file: str) -> str:
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
