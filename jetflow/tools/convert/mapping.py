"""Published tensors to jetflow's variables and back, by a table of which is which."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jetflow.types import UsageError

Tensors = dict[str, np.ndarray]
Variables = dict[str, Any]


class Row(NamedTuple):
    """One kind of variable.

    Attributes:
        path: of the variable; `{block}` counts the blocks.
        names: of the published tensors that make it up; `{layer}` counts the layers of a
            transformer, which the variable has stacked along an axis.
        read: from these tensors to the variable; raises a ValueError on a wrong shape.
        write: back to the one tensor, where a table serves both ways.
    """

    path: str
    names: tuple[str, ...]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], np.ndarray] | None = None


class Table(NamedTuple):
    """All of a model's tensors.

    Attributes:
        rows: those that hold parameters.
        constants: those that hold none: name -> from the tensor, the value that it must have.
        layer_axis: of the variables, the axis along which the layers are stacked.
    """

    rows: Sequence[Row]
    constants: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    layer_axis: int

    def names(self, path: str, shape: tuple[int, ...]) -> tuple[Row | None, list[list[str]]]:
        """The row of a variable, and the tensors of each of its layers."""
        for row in self.rows:
            if match := _match(row.path, path):
                is_stacked = "{layer}" in row.names[0]
                layers = range(shape[self.layer_axis]) if is_stacked else [0]
                return row, [
                    [name.format(layer=layer, **match.groupdict()) for name in row.names]
                    for layer in layers
                ]
        return None, []


def from_published(file: Any, table: Table, tensors: Tensors, abstract: Variables) -> Variables:
    """The variables that the tensors are.

    Args:
        file: the checkpoint, for messages.
        tensors: by name.
        abstract: the variables' shapes and types.

    Raises:
        UsageError: if a tensor is left over, a variable is not filled, or something does not fit;
            the message lists all such names.
    """
    variables: dict[str, Any] = flatten_dict(abstract, sep="/")  # type: ignore[assignment]
    sources = {path: table.names(path, leaf.shape) for path, leaf in variables.items()}
    expected = {name for _, layers in sources.values() for names in layers for name in names}
    constants = {
        name: next((rule for key, rule in table.constants.items() if _match(key, name)), None)
        for name in tensors
        if name not in expected
    }
    _refuse(file, "nothing fills", [path for path, (row, _) in sources.items() if row is None])
    _refuse(file, "missing", sorted(expected - set(tensors)))
    _refuse(file, "unknown", [repr(name) for name, rule in constants.items() if rule is None])
    _refuse(file, "not of real numbers", [
        f"{name} ({array.dtype})" for name, array in tensors.items()
        if array.dtype.kind not in "fiub" and array.dtype != jnp.bfloat16
    ])  # fmt: skip
    _refuse(file, "not as in the published model", [
        name for name, rule in constants.items()
        if rule and not np.array_equal(tensors[name], rule(tensors[name]))
    ])  # fmt: skip
    filled = {name: _assemble(file, table, tensors, *source) for name, source in sources.items()}
    _refuse(file, "of another shape", [
        f"{path} (is {array.shape}, expected {variables[path].shape})"
        for path, array in filled.items() if array.shape != variables[path].shape
    ])  # fmt: skip
    typed = {path: jnp.asarray(array, variables[path].dtype) for path, array in filled.items()}
    return unflatten_dict(typed, sep="/")


def to_published(table: Table, variables: Variables) -> Tensors:
    """The tensors that variables are, without the constants; for tables that serve both ways."""
    tensors = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        array = np.asarray(leaf)
        row, layers = table.names(path, array.shape)
        assert row is not None and row.write is not None
        is_stacked = "{layer}" in row.names[0]
        for layer, (name,) in enumerate(layers):
            part = np.take(array, layer, table.layer_axis) if is_stacked else array
            tensors[name] = row.write(part)
    return tensors


def _assemble(
    file: Any, table: Table, tensors: Tensors, row: Row | None, layers: Sequence[Sequence[str]]
) -> np.ndarray:
    assert row is not None
    try:
        arrays = [row.read(*(tensors[name] for name in names)) for names in layers]
        return np.stack(arrays, table.layer_axis) if "{layer}" in row.names[0] else arrays[0]
    except (IndexError, ValueError) as error:
        shapes = ", ".join(f"{name} {tensors[name].shape}" for names in layers for name in names)
        raise UsageError(
            f"{file}: the tensors {shapes[:400]} do not fit: {error}; check that the checkpoint is "
            "of this model"
        ) from error


def _match(pattern: str, name: str) -> re.Match[str] | None:
    """`{block}` in a pattern stands for a number."""
    regex = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(pattern))
    return re.fullmatch(regex, name)


def _refuse(file: Any, reason: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(name[:100] for name in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UsageError(
            f"{file}: the tensors are not those of the model; {reason}: {shown}{more}; check that "
            "the checkpoint is of this model and saved whole, in real numbers"
        )
