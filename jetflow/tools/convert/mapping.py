"""Published tensors to jetflow's variables and back, by a table of which is which.

A row maps the name of a tensor to the path of a variable and a layout. `{block}` and `{layer}` in a
name count the blocks and, within each, the layers of its transformer, which a variable has stacked
along one of its axes.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jetflow.types import UsageError

Tensors = dict[str, np.ndarray]
Variables = dict[str, Any]


class Layout(NamedTuple):
    """A published tensor as jetflow has it, and back, where a table serves both ways.

    `read` raises a ValueError if the tensor does not have the shape that it should.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray] | None = None


class Row(NamedTuple):
    """One kind of tensor.

    Attributes:
        name: of the published tensor.
        path: of the variable.
        layout: applied to the tensor.
        part: (i, n): the tensor is the i-th of n that lie side by side in the last axis.
    """

    name: str
    path: str
    layout: Layout
    part: tuple[int, int] = (0, 1)


Source = tuple[str, Row, int | None]  # a tensor's name, its row, and the layer that it is of


class Table(NamedTuple):
    """All of a model's tensors.

    Attributes:
        rows: those that hold parameters.
        constants: those that hold none: name -> from the tensor, what it must be.
        layer_axis: of the variables, the axis along which the layers are stacked.
    """

    rows: Sequence[Row]
    constants: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    layer_axis: int


def from_published(table: Table, tensors: Tensors, abstract: Variables) -> Variables:
    """The variables that the tensors are.

    Args:
        tensors: by name.
        abstract: the variables' shapes and types.

    Raises:
        UsageError: if a tensor is left over, a variable is not filled, or something does not fit;
            the message lists all such names.
    """
    variables: dict[str, Any] = flatten_dict(abstract, sep="/")  # type: ignore[assignment]
    sources = {path: list(_sources(table, path, leaf.shape)) for path, leaf in variables.items()}
    expected = {name for found in sources.values() for name, _, _ in found}
    constants = {name: _constant(table, name) for name in tensors if name not in expected}
    _refuse({
        "nothing fills": [path for path, found in sources.items() if not found],
        "missing": sorted(expected - set(tensors)),
        "unknown": [repr(name) for name, constant in constants.items() if constant is None],
    })  # fmt: skip
    _refuse({"not of real numbers": [
        f"{name} ({array.dtype})" for name, array in tensors.items() if not _is_real(array)
    ]})  # fmt: skip
    _refuse({"not as in the published model": [
        name for name, constant in constants.items()
        if constant and not np.array_equal(tensors[name], constant(tensors[name]))
    ]})  # fmt: skip
    filled = {path: _assemble(table, tensors, found) for path, found in sources.items()}
    _refuse({"of another shape": [
        f"{path} (is {array.shape}, expected {variables[path].shape})"
        for path, array in filled.items() if array.shape != variables[path].shape
    ]})  # fmt: skip
    typed = {path: jnp.asarray(array, variables[path].dtype) for path, array in filled.items()}
    return unflatten_dict(typed, sep="/")


def to_published(table: Table, variables: Variables) -> Tensors:
    """The tensors that variables are, without the constants; the inverse of `from_published`.

    Raises:
        UsageError: if the table serves for reading only.
    """
    one_way = [row.name for row in table.rows if row.layout.write is None]
    if one_way:
        raise UsageError(f"this model can be read but not written: {one_way[0]} has no way back")
    tensors = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        array = np.asarray(leaf)
        for name, row, layer in _sources(table, path, array.shape):
            one = array if layer is None else np.take(array, layer, table.layer_axis)
            index, count = row.part
            part = np.split(one, count, axis=-1)[index]
            tensors[name] = row.layout.write(part)  # type: ignore[misc]
    return tensors


def _sources(table: Table, path: str, shape: tuple[int, ...]) -> Iterator[Source]:
    """The names of the tensors that make up a variable, each with its row and layer."""
    for row in table.rows:
        if match := _match(row.path, path):
            if "{layer}" in row.name:
                for layer in range(shape[table.layer_axis]):
                    yield row.name.format(layer=layer, **match.groupdict()), row, layer
            else:
                yield row.name.format(**match.groupdict()), row, None


def _assemble(table: Table, tensors: Tensors, sources: Sequence[Source]) -> np.ndarray:
    """Parts side by side, then layers stacked."""
    layers: dict[int | None, dict[int, np.ndarray]] = {}
    try:
        for name, row, layer in sources:
            layers.setdefault(layer, {})[row.part[0]] = row.layout.read(tensors[name])
        arrays = [
            np.concatenate([parts[index] for index in sorted(parts)], axis=-1)
            for parts in layers.values()
        ]
        return arrays[0] if None in layers else np.stack(arrays, axis=table.layer_axis)
    except (IndexError, ValueError) as error:
        shapes = [f"{name} {tensors[name].shape}" for name, _, _ in sources]
        raise UsageError(
            f"the tensors {', '.join(shapes)} do not fit: {error}; check that the checkpoint is of "
            "this model"
        ) from error


def _constant(table: Table, name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    found = [rule for pattern, rule in table.constants.items() if _match(pattern, name)]
    return found[0] if found else None


def _match(pattern: str, name: str) -> re.Match[str] | None:
    """`{block}` in a pattern stands for a number."""
    regex = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(pattern))
    return re.fullmatch(regex, name)


def _is_real(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiub" or array.dtype == jnp.bfloat16


def _refuse(reasons: Mapping[str, Sequence[str]]) -> None:
    found = [f"{what}: {', '.join(names)}" for what, names in reasons.items() if names]
    if found:
        raise UsageError(
            f"the tensors are not those of the model; {'; '.join(found)}; check that the "
            "checkpoint is of this model and saved whole, in real numbers"
        )
