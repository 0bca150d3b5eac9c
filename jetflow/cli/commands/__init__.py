"""The commands of `jetflow`, a file or a folder each, and the flags that they share.

A command has `USAGE`, an example; `ARGUMENTS`, the names of what is no flag;
`define(values, argv)`, which adds its flags; and `run(values, *arguments)`, which does the work and
returns the exit status.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Bool

from jetflow import hosts, sharding
from jetflow.sampling.ancestral import not_finite
from jetflow.types import UsageError


def definer(values: flags.FlagValues) -> Callable[..., None]:
    """`define(kind, name, default, text, …)`, which adds a flag to `values`."""

    def define(kind: Callable, name: str, default: Any, text: str, **options) -> None:
        kind(name, default, help=text, flag_values=values, **options)

    return define


def define_workdir(values: flags.FlagValues) -> None:
    definer(values)(flags.DEFINE_string, "workdir", None, "the folder of the run")


def define_data_dir(values: flags.FlagValues) -> None:
    text = "prepared data sets; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    definer(values)(flags.DEFINE_string, "data_dir", None, text)


def define_step(values: flags.FlagValues) -> None:
    definer(values)(flags.DEFINE_integer, "step", None, "of the checkpoint; default: the newest")


def define_mesh(values: flags.FlagValues) -> None:
    text = "how the devices are laid out: sizes of data, fsdp and tensor; default: all of them data"
    definer(values)(flags.DEFINE_list, "mesh", ["data=-1"], text)


def mesh(values: flags.FlagValues) -> Mesh:
    """The mesh that --mesh asks for.

    Raises:
        UsageError: if it is malformed, or does not fit the devices.
    """
    sizes = {}
    for text in values.mesh:
        axis, _, size = text.partition("=")
        if axis not in sharding.AXES or not size.removeprefix("-").isdecimal():
            raise UsageError(f"--mesh has {text!r}; expected AXIS=SIZE, as in --mesh data=2,fsdp=4")
        sizes[axis] = int(size)
    return sharding.make_mesh(**sizes, asked_by="--mesh")


def required(values: flags.FlagValues, name: str, example: str) -> Any:
    """The value of a flag that has no default.

    Raises:
        UsageError: if it was not given.
    """
    if values[name].value is None:
        raise UsageError(f"--{name} is missing; expected --{name} {example}")
    return values[name].value


def whole_number(flag: str, text: str) -> int:
    """A number from a list flag.

    Raises:
        UsageError: unless it is whole and above 0.
    """
    if not text.isdecimal() or not int(text):
        raise UsageError(f"--{flag} has {text!r}; expected whole numbers above 0")
    return int(text)


def complain(finite: Bool[np.ndarray, "N"]) -> None:
    """Tell a person of images that are not finite."""
    if hosts.is_first() and (complaint := not_finite(finite)):
        print(f"jetflow: {complaint}", file=sys.stderr)


def check_writable(flag: str, path: str | None) -> None:
    """Raise a UsageError if a file cannot be written there: before the work, not after it."""
    if path is None:
        return
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if Path(path).is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--{flag} {path} cannot be written; give the path of a new file")
