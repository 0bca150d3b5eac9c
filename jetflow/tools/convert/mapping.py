"""Published tensors to jetflow's variables and back, by a table of which is which."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jetflow.types import UsageError

Tensors = dict[str, np.ndarray]
Variables = dict[str, Any]


class Row(NamedTuple):
    """What a variable is made of.

    Attributes:
        names: of the published tensors, for each layer that the variable has stacked.
        read: from the tensors of a layer to the variable; raises a ValueError on a wrong shape.
        write: back to the one tensor, where a table serves both ways.
        axis: of the layers; None where there is one.
    """

    names: Sequence[Sequence[str]]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], np.ndarray] | None = None
    axis: int | None = None


class Table(NamedTuple):
    """All of a model's tensors.

    Attributes:
        rows: by the paths of the variables.
        constants: tensors that hold no parameters: name -> from the tensor, the value that it must
            have.
    """

    rows: Mapping[str, Row]
    constants: Mapping[str, Callable[[np.ndarray], np.ndarray]]


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
    rows = {path: table.rows[path] for path in variables if path in table.rows}
    expected = {name for row in rows.values() for names in row.names for name in names}
    others = set(tensors) - expected
    constants = {name: rule for name, rule in table.constants.items() if name in others}
    _refuse(file, "nothing fills", [path for path in variables if path not in rows])
    _refuse(file, "missing", sorted(expected - set(tensors)))
    _refuse(file, "unknown", [repr(name) for name in sorted(others - set(constants))])
    _refuse(file, "not of real numbers", [
        f"{name} ({array.dtype})" for name, array in tensors.items()
        if array.dtype.kind not in "fiub" and array.dtype != jnp.bfloat16
    ])  # fmt: skip
    _refuse(file, "not as in the published model", [
        name for name, rule in constants.items()
        if not np.array_equal(tensors[name], rule(tensors[name]))
    ])  # fmt: skip
    filled = {path: _assemble(file, row, tensors) for path, row in rows.items()}
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
        row, array = table.rows[path], np.asarray(leaf)
        assert row.write is not None
        for layer, (name,) in enumerate(row.names):
            tensors[name] = row.write(array if row.axis is None else array.take(layer, row.axis))
    return tensors


def _assemble(file: Any, row: Row, tensors: Tensors) -> np.ndarray:
    try:
        arrays = [row.read(*(tensors[name] for name in names)) for names in row.names]
        return arrays[0] if row.axis is None else np.stack(arrays, row.axis)
    except (IndexError, ValueError) as error:
        shapes = ", ".join(f"{name} {tensors[name].shape}" for names in row.names for name in names)
        raise UsageError(
            f"{file}: the tensors {shapes[:400]} do not fit: {error}; check that the checkpoint is "
            "of this model"
        ) from error


def _refuse(file: Any, reason: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(name[:100] for name in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UsageError(
            f"{file}: the tensors are not those of the model; {reason}: {shown}{more}; check that "
            "the checkpoint is of this model and saved whole, in real numbers"
        )
