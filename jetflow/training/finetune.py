"""The first state of a training from another run's weights, as `config.init_from` asks for.

The two flows may differ in the height and width of their images and in their classes, in nothing
else. Every array is loaded as it is; or resampled, if it has a value for each token and the grid of
tokens differs; or fresh, as at the start of any training; or dropped.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jetflow import checksums
from jetflow.fields import differences, shown
from jetflow.flows import coupling
from jetflow.flows.build import with_defaults
from jetflow.model import load_model
from jetflow.training.resample import between_grids, between_spatial_splits
from jetflow.training.step import Trainer, TrainState, abstract_variables
from jetflow.types import Config, Flow, UsageError, is_arrays

# Arrays with an entry for each token: their fate on another grid, and the axis of the tokens.
OF_TOKENS = {
    "position": ("resampled", -2),
    "variance": ("resampled", -2),
    "token_order": ("fresh", -1),
}
# Data sets of other names with the same classes in the same order.
SAME_CLASSES = {"imagenet32_new": "imagenet64_new", "afhq_v2": "afhq"}
# Fields that a flow's parameters do not depend on.
COMPUTATION = ("flow.dtype", "flow.precision", "flow.attention", "flow.remat", "flow.scan")

Shape = tuple[int, ...]


class Fate(NamedTuple):
    """What becomes of an array, its shapes in both flows, and why."""

    fate: str  # loaded, resampled, fresh or dropped
    old: Shape | None
    new: Shape | None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """A flow on one side of a transfer, and the config of its training, plain values."""

    flow: Flow
    config: Mapping[str, Any]

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Path → shape: "params/blocks_0/position"."""
        flat = checksums.flatten(abstract_variables(self.flow))
        return {path: array.shape for path, array in flat.items()}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        if is_arrays(self.flow.image_shape):
            return self.flow.image_shape[0], 1
        height, width, _ = self.flow.image_shape
        patch = self.config["flow"]["patch_size"]
        return height // patch, width // patch

    @property
    def classes(self) -> str:
        """Whose classes the flow has: "imagenet1k/64" has those of "imagenet1k/128"."""
        name = re.sub(r"/\d+$", "", self.config["data"]["name"])
        return SAME_CLASSES.get(name, name)

    @property
    def fields(self) -> dict[str, Any]:
        """All that both flows must have in common, each value in one spelling."""
        section = with_defaults(self.config["flow"])
        if depths := section.get("layers_per_block"):
            depths = [depths] if isinstance(depths, int) else list(depths)
            section["layers_per_block"] = depths * (section["num_blocks"] // len(depths))
        return json.loads(json.dumps({"flow": section, "channels": self.flow.image_shape[-1]}))


def first_state(
    config: Config, trainer: Trainer, mesh: Mesh, shardings: TrainState
) -> tuple[TrainState, str]:
    """A state with the weights of the run `config.init_from`, and a table of their fates.

    The optimizer and the step are fresh; averages start from the parameters.

    Raises:
        UsageError: if that is no run with a sound checkpoint, or a flow that differs in more than
            a transfer can bridge.
    """
    try:
        model = load_model(config.init_from, mesh=mesh, weights=config.init_weights)
        source, target = Side(model.flow, model.config), Side(trainer.flow, config.to_dict())
        plan = make_plan(source, target)
        resampled = any(fate.fate == "resampled" for fate in plan.values())
        tokens = _token_weights(source, target, model.variables) if resampled else []
    except UsageError as error:
        raise UsageError(f"config.init_from is {config.init_from}: {error}") from error

    def initial(variables: Mapping[str, Any]) -> TrainState:
        state, old = trainer.first_state(), checksums.flatten(variables)
        fresh = {"params": state.params, **state.collections}
        arrays = checksums.flatten(fresh)
        for path in arrays:
            if plan[path].fate == "loaded":
                arrays[path] = old[path]
            elif plan[path].fate == "resampled":
                arrays[path] = _resampled(old[path], tokens)
        collections = jax.tree.unflatten(jax.tree.structure(fresh), arrays.values())
        params = collections.pop("params")
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state.replace(params=params, collections=collections, ema=ema)

    state = jax.jit(initial, out_shardings=shardings)(model.variables)
    which = "averaged weights" if model.weights == "ema" else "weights"
    return state, f"{which} of {model.workdir}, step {model.step}:\n{describe(plan)}"


def make_plan(source: Side, target: Side) -> dict[str, Fate]:
    """Path → fate, for all arrays of both flows.

    Raises:
        UsageError: if the flows differ in more than a transfer can bridge; the message names the
            fields, and the arrays.
    """
    paths = sorted({**target.shapes, **source.shapes}, key=lambda path: path[:7] != "params/")
    plan = {path: _fate(path, source, target) for path in paths}
    differing = differences(source.fields, target.fields, COMPUTATION)
    differing |= {
        path: (_text(source.shapes.get(path)), _text(target.shapes.get(path)))
        for path, fate in plan.items()
        if fate is None
    }
    if differing:
        raise UsageError(
            f"it holds another flow: {shown(differing)}; set the flow of that run: only "
            "the height and width of the images, and the classes, may differ"
        )
    return {path: fate for path, fate in plan.items() if fate is not None}


def _fate(path: str, source: Side, target: Side) -> Fate | None:
    """None if an array of one flow has no counterpart in the other."""
    old, new = source.shapes.get(path), target.shapes.get(path)
    name = path.rpartition("/")[2]
    if name == "class_embedding":
        return _fate_of_classes(source, target, old, new)
    if old is None or new is None:
        return None
    if source.grid == target.grid or name not in OF_TOKENS:
        return Fate("loaded", old, new) if old == new else None
    fate, axis = OF_TOKENS[name]
    expected = list(old)
    expected[axis] = math.prod(target.grid)
    patterns = "" if fate == "resampled" else "the same patterns, "
    why = f"{patterns}{_text(source.grid)} -> {_text(target.grid)}"
    return Fate(fate, old, new, why) if new == tuple(expected) else None


def _fate_of_classes(source: Side, target: Side, old, new) -> Fate | None:
    """Class 7 of one data set is not that of another: only those of the same one are loaded."""
    if new is None:
        return Fate("dropped", old, new, "this flow has no labels")
    if old is None:
        return Fate("fresh", old, new, "that run has no labels")
    if old[-1] != new[-1]:  # another width
        return None
    if source.classes == target.classes and old == new:
        return Fate("loaded", old, new, f"the classes of {target.classes}")
    others = source.classes or "data that its config does not name"
    why = f"{new[-2]} classes of {target.classes}, not the {old[-2]} of {others}"
    return Fate("fresh", old, new, why)


def _token_weights(
    source: Side, target: Side, variables: Mapping[str, Any]
) -> list[Float[np.ndarray, "N T"]]:
    """The weights that resample a table with a row for each token; one for each coupling of a Jet.

    Raises:
        UsageError: if the splits of a Jet have patterns that are not known for another grid.
    """
    old, new, section = source.grid, target.grid, source.config["flow"]
    if section["kind"] != "jet":
        return [between_grids(old, new)]
    couplings, kinds = section["num_couplings"], tuple(section["kinds"])
    expected = coupling.splits(couplings, kinds, old, source.flow.latent_shape[1]).token_order
    if not jnp.array_equal(variables["constants"]["blocks_0"]["token_order"], expected):
        raise UsageError(
            "its constants/blocks_0/token_order are not the patterns of its config.flow.kinds, so "
            f"they cannot be had on {_text(new)} tokens; set what gives {_text(old)}"
        )
    return [
        between_spatial_splits(pattern, old, new) if pattern else between_grids(old, new)
        for pattern in coupling.layer_patterns(couplings, kinds)
    ]


def _resampled(
    array: Float[Array, "*L T W"], weights: Sequence[Float[np.ndarray, "N T"]]
) -> Float[Array, "*L N W"]:
    """Tables of values for each token, each resampled by its weights."""
    *layers, tokens, width = array.shape
    tables = [
        jnp.matmul(jnp.asarray(weight, array.dtype), table, precision="highest")
        for weight, table in zip(weights, array.reshape(-1, tokens, width), strict=True)
    ]
    return jnp.stack(tables).reshape(*layers, -1, width)


def describe(plan: Mapping[str, Fate]) -> str:
    """The plan as a table for a person, equal rows of numbered blocks as one, and its sums."""
    groups: dict[tuple[str, Fate], list[str]] = {}
    sums: dict[str, int] = dict.fromkeys(("loaded", "resampled", "fresh", "dropped"), 0)
    for path, fate in plan.items():
        name = path.removeprefix("params/")
        groups.setdefault((re.sub(r"\d+", "*", name), fate), []).append(name)
        sums[fate.fate] += (name != path) * math.prod(fate.new or fate.old or ())
    rows = [("array", "shape", "what happens", "values")]
    for (name, (fate, old, new, why)), paths in groups.items():
        shapes = [_text(shape) for shape in (old, new) if shape is not None]
        rows.append((
            paths[0] if len(paths) == 1 else f"{name} ({len(paths)})",
            " -> ".join(dict.fromkeys(shapes)),
            f"{fate}: {why}" if why else fate,
            f"{math.prod(new or old or ()) * len(paths):,}",
        ))  # fmt: skip
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"  {row[0]:{a}}  {row[1]:{b}}  {row[2]:{c}}  {row[3]:>{d}}" for row in rows]
    totals = ", ".join(f"{total:,} {fate}" for fate, total in sums.items())
    return "\n".join([*lines, f"parameters: {totals}"])


def _text(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
