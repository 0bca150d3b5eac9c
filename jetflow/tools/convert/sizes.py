"""What a model's sizes are read off, and the checks of the sizes that a user gives."""

import itertools
import math
import os
import re

from jetflow.tools.convert.mapping import Tensors
from jetflow.types import UsageError

Path = str | os.PathLike


def shape_of(path: Path, tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that the sizes of the model are read off."""
    if name not in tensors:
        first = ", ".join(map(repr, list(tensors)[:3]))
        raise UsageError(
            f"{path} is not of this model: it has no tensor {name}, but {first}, …; give a "
            "checkpoint of the model itself"
        )
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise UsageError(
            f"{path}: {name} is {shape}; expected {axes} axes, none of them empty; check that the "
            "checkpoint is of this model"
        )
    return shape


def check_patches(
    image: str, patch_size: int, given: tuple[int, int], there: tuple[int, int]
) -> None:
    """Raise unless an image gives the (tokens, features) that the checkpoint has."""
    if given != there:
        raise UsageError(
            f"{image} and patch_size {patch_size} make {given[0]} patches of {given[1]} features, "
            f"but the checkpoint has {there[0]} of {there[1]}; correct them"
        )


def check_positive(**values: float | int) -> None:
    """Raise a UsageError for the first that is not a number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value}; expected a number above 0")


def count_parts(tensors: Tensors, prefix: str) -> int:
    """How many parts the names have that begin with `prefix` and a number: 0, 1, 2, … to a gap."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)[./]")
    numbers = {match[1] for name in tensors if (match := pattern.match(name))}
    return max(1, next(n for n in itertools.count() if str(n) not in numbers))
