"""The first state of a training from another run's weights, as `config.init_from` asks for.

The two flows may differ in the height and width of their images and in their classes, in nothing
else. Every array is loaded as it is; or resampled, if it has a value for each token and the grid of
tokens differs; or fresh, as at the start of any training; or dropped.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jetflow import checksums, sharding
from jetflow import workdir as workdirs
from jetflow.checkpoint import Checkpoints
from jetflow.flows import coupling
from jetflow.flows.build import with_defaults
from jetflow.training.resample import between_grids, between_spatial_splits
from jetflow.training.step import TrainState, abstract_variables
from jetflow.types import Config, Flow, UsageError

FATES = ("loaded", "resampled", "fresh", "dropped")
WEIGHTS = ("auto", "ema", "params")
# Arrays with an entry for each token: their fate on another grid, and the axis of the tokens.
OF_TOKENS = {
    "position": ("resampled", -2),
    "variance": ("resampled", -2),
    "token_order": ("fresh", -1),
}
# Data sets of other names with the same classes in the same order.
SAME_CLASSES = {"imagenet32_new": "imagenet64_new", "afhq_v2": "afhq"}
# Fields of a flow that its parameters do not depend on.
COMPUTATION = ("dtype", "precision", "attention", "remat", "scan")

Shape = tuple[int, ...]


class Fate(NamedTuple):
    """What becomes of an array: one of `FATES`, its shapes in both flows, and why."""

    fate: str
    old: Shape | None
    new: Shape | None
    why: str = ""

    @property
    def size(self) -> int:
        return math.prod((self.old if self.new is None else self.new) or ())


@dataclasses.dataclass(frozen=True)
class Side:
    """A flow on one side of a transfer, and the config of its training, plain values."""

    flow: Flow
    config: Mapping[str, Any]

    @functools.cached_property
    def abstract(self) -> dict[str, Any]:
        """Shapes and types of the variables, by collection."""
        return abstract_variables(self.flow)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Path → shape: "params/blocks_0/position"."""
        return {path: array.shape for path, array in checksums.flatten(self.abstract).items()}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
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
        """All that both flows must have in common, by name, each value in one spelling."""
        section = with_defaults(self.config["flow"])
        if depths := section.get("layers_per_block"):
            depths = [depths] if isinstance(depths, int) else list(depths)
            section["layers_per_block"] = depths * (section["num_blocks"] // len(depths))
        fields = {f"config.flow.{k}": v for k, v in section.items() if k not in COMPUTATION}
        fields["the number of colour channels"] = self.flow.image_shape[2]
        return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def first_state(
    config: Config, flow: Flow, create: Callable[[], TrainState], mesh: Mesh, shardings: TrainState
) -> tuple[TrainState, str]:
    """`create()` with the weights of the run `config.init_from`, and a table of their fates.

    The optimizer and the step are fresh; averages start from the parameters.

    Raises:
        UsageError: if that is no run with a sound checkpoint, or a flow that differs in more than
            a transfer can bridge.
    """
    workdir, weights = Path(config.init_from), config.init_weights
    try:
        if weights not in WEIGHTS:
            raise UsageError(f"config.init_weights is {weights!r}; expected one of {WEIGHTS}")
        old_config, old_flow, best = workdirs.read_flow(workdir, dtype="float32")
        if weights == "ema" and best != "ema":
            raise UsageError("it has no averaged weights; set config.init_weights to 'auto'")
        weights = best if weights == "auto" else weights
        source, target = Side(old_flow, old_config), Side(flow, config.to_dict())
        plan = make_plan(source, target)
        variables, step = _restore(source, workdir, weights, mesh, config.mesh.rules)
        resampled = any(fate.fate == "resampled" for fate in plan.values())
        tokens = _token_weights(source, target, variables) if resampled else []
    except UsageError as error:
        raise UsageError(f"config.init_from is {workdir}: {error}") from error

    def initial(variables: Mapping[str, Any]) -> TrainState:
        state, old = create(), checksums.flatten(dict(variables))

        def chosen(path: str, array: Array) -> Array:
            fate = plan[path].fate
            if fate == "fresh":
                return array
            return _resampled(old[path], tokens) if fate == "resampled" else old[path]

        fresh = {"params": state.params, **state.collections}
        leaves = [chosen(path, array) for path, array in checksums.flatten(fresh).items()]
        collections = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
        params = collections.pop("params")
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state.replace(params=params, collections=collections, ema=ema)

    state = jax.jit(initial, out_shardings=shardings)(variables)
    which = "averaged weights" if weights == "ema" else "weights"
    return state, f"{which} of {workdir}, step {step}:\n{describe(plan)}"


def make_plan(source: Side, target: Side) -> dict[str, Fate]:
    """Path → fate, for all arrays of both flows.

    Raises:
        UsageError: if the flows differ in more than a transfer can bridge; the message names the
            fields, and the arrays.
    """
    paths = sorted({**target.shapes, **source.shapes}, key=lambda path: path[:7] != "params/")
    plan = {path: _fate(path, source, target) for path in paths}
    old, new = source.fields, target.fields
    differing = {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }
    differing |= {
        path: (_text(source.shapes.get(path)), _text(target.shapes.get(path)))
        for path, fate in plan.items()
        if fate is None
    }
    if differing:
        raise UsageError(
            f"it holds another flow: {workdirs.shown(differing)}; set the flow of that run: only "
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


def _restore(
    source: Side, workdir: Path, weights: str, mesh: Mesh, rules: Any
) -> tuple[dict[str, Any], int]:
    """The source's variables and their step: parameters laid out as in training, the rest whole."""
    collections = dict(source.abstract)
    params = {"params": collections.pop("params")}
    shardings = sharding.state_shardings(mesh, params, rules)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), collections)
    wanted = {
        weights: sharding.placed(params, shardings)["params"],
        "collections": sharding.placed(collections, whole),
    }
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        restored, step = checkpoints.restore(wanted)
    return {"params": restored[weights], **restored["collections"]}, step


def _token_weights(
    source: Side, target: Side, variables: Mapping[str, Any]
) -> list[Float[np.ndarray, "N T"]]:
    """The weights that resample a table with a row for each token; one for each coupling of a Jet.

    Raises:
        UsageError: if the splits of a Jet have patterns that are not known for another grid.
    """
    old, new = source.grid, target.grid
    if source.config["flow"]["kind"] != "jet":
        return [between_grids(old, new)]
    section = source.config["flow"]
    couplings, kinds = section["num_couplings"], tuple(section["kinds"])
    expected = coupling.splits(couplings, kinds, old, source.flow.latent_shape[1]).token_order
    if not np.array_equal(variables["constants"]["blocks_0"]["token_order"], expected):
        raise UsageError(
            "its constants/blocks_0/token_order are not the patterns of its config.flow.kinds, so "
            f"they cannot be had on {_text(new)} tokens; set what gives {_text(old)}"
        )
    patterns = coupling.layer_patterns(couplings, kinds)
    weights = {
        pattern: between_spatial_splits(pattern, old, new) if pattern else between_grids(old, new)
        for pattern in set(patterns)
    }
    return [weights[pattern] for pattern in patterns]


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
    for path, fate in plan.items():
        path = path.removeprefix("params/")
        groups.setdefault((re.sub(r"\d+", "*", path), fate), []).append(path)
    rows = [("array", "shape", "what happens", "values")]
    for (name, fate), paths in groups.items():
        shapes = [_text(shape) for shape in (fate.old, fate.new) if shape is not None]
        rows.append((
            paths[0] if len(paths) == 1 else f"{name} ({len(paths)})",
            " -> ".join(dict.fromkeys(shapes)),
            fate.fate + (f": {fate.why}" if fate.why else ""),
            f"{fate.size * len(paths):,}",
        ))  # fmt: skip
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"  {row[0]:{a}}  {row[1]:{b}}  {row[2]:{c}}  {row[3]:>{d}}" for row in rows]
    params = [fate for path, fate in plan.items() if path.startswith("params/")]
    sums = [f"{sum(f.size for f in params if f.fate == fate):,} {fate}" for fate in FATES]
    return "\n".join([*lines, f"parameters: {', '.join(sums)}"])


def _text(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
