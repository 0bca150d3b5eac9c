"""A training that starts from another run's weights: what of them is taken, and how.

The two flows may differ in the height and width of their images and in their classes, in nothing
else. Every array gets one of four fates: loaded as it is; resampled, where it has values for each
token and the grid of tokens differs; fresh, as at the start of any training; or dropped.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jetflow import manifest, sharding
from jetflow import workdir as workdirs
from jetflow.checkpoint import Checkpoints
from jetflow.flows import orders, resample
from jetflow.state import TrainState, abstract_variables
from jetflow.types import Flow, UsageError

WEIGHTS = ("auto", "ema", "params")
FATES = ("loaded", "resampled", "fresh", "dropped")
# What has values for each token, which depend on the grid of tokens.
OF_TOKENS = {"position": "resampled", "variance": "resampled", "token_order": "fresh"}
COMPUTATION = ("dtype", "remat", "scan")  # fields of a flow that its parameters do not depend on


@dataclasses.dataclass(frozen=True)
class Side:
    """A flow on one side of a transfer.

    Attributes:
        flow: itself.
        section: `config.flow` of it, plain values.
        data: the name of the data set that it is trained on; "" if unknown.
        abstract: shapes and types of its variables, by collection.
    """

    flow: Flow
    section: Mapping[str, Any]
    data: str
    abstract: Mapping[str, Any]

    @property
    def arrays(self) -> dict[str, Any]:
        """Path → shape and type: "params/blocks_0/position"."""
        return manifest.flatten(dict(self.abstract))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width, _ = self.flow.image_shape
        return height // self.section["patch_size"], width // self.section["patch_size"]

    @property
    def classes(self) -> str:
        """Whose classes the flow has: "imagenet1k/64" those of "imagenet1k/128"."""
        return self.data.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Source(Side):
    """The run whose weights are taken.

    Attributes:
        workdir: of it.
        weights: the field of its checkpoints: "ema" or "params".
    """

    workdir: Path
    weights: str


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of an array.

    Attributes:
        fate: one of `FATES`.
        there, here: its shapes; None where there is none.
        why: for a person.
    """

    fate: str
    there: tuple[int, ...] | None
    here: tuple[int, ...] | None
    why: str = ""

    @property
    def size(self) -> int:
        shape = self.there if self.here is None else self.here
        return math.prod(shape or ())


def open_source(workdir: Path, weights: str) -> Source:
    """The run in `workdir`, and which of its weights to take.

    Args:
        weights: one of `WEIGHTS`; "auto" takes averaged ones where there are any.

    Raises:
        UsageError: if there is no run, or it has no such weights.
    """
    if weights not in WEIGHTS:
        raise UsageError(
            f"config.init_weights is {weights!r}; expected one of {', '.join(WEIGHTS)}"
        )
    config, flow, best = workdirs.read_flow(workdir, dtype="float32")
    if weights == "ema" and best != "ema":
        raise UsageError(
            "config.init_weights is 'ema', but that run has no averaged weights; set it to 'auto'"
        )
    return Source(
        flow=flow,
        section=config["flow"],
        data=config["data"]["name"],
        abstract=abstract_variables(flow),
        workdir=workdir,
        weights=best if weights == "auto" else weights,
    )


def make_plan(source: Source, target: Side) -> dict[str, Fate]:
    """Path → fate of all arrays of both flows.

    Raises:
        UsageError: if the flows differ in more than a transfer can bridge; the message names the
            fields, and the arrays.
    """
    there, here = source.arrays, target.arrays
    paths = sorted({**here, **there}, key=lambda path: not path.startswith("params/"))
    plan = {path: _fate(path, source, target, there, here) for path in paths}
    fields = _differing_fields(source, target)
    arrays = [
        f"{path} is {_shape(there.get(path))} there and {_shape(here.get(path))} here"
        for path, fate in plan.items()
        if fate is None
    ]
    if fields or arrays:
        arrays = arrays[:3] + ([f"and {len(arrays) - 3} more"] if len(arrays) > 3 else [])
        raise UsageError(
            f"it holds another flow: {', '.join(fields + arrays)}; set what is there: only the "
            "images' height and width, and the classes, may differ"
        )
    return {path: fate for path, fate in plan.items() if fate is not None}


def _fate(path: str, source: Source, target: Side, there, here) -> Fate | None:
    """None where an array of one side has no counterpart on the other."""
    old, new = there.get(path), here.get(path)
    shapes = (old and old.shape, new and new.shape)
    if path.endswith("/class_embedding"):
        return _fate_of_classes(source, target, *shapes)
    if old is None or new is None or old.dtype != new.dtype:
        return None
    grids = source.grid, target.grid
    kind = "loaded" if grids[0] == grids[1] else OF_TOKENS.get(path.rpartition("/")[2], "loaded")
    axes = {"resampled": -2, "fresh": -1}  # the one of the tokens
    if kind == "loaded":
        return Fate(kind, *shapes) if old.shape == new.shape else None
    expected = list(old.shape)
    expected[axes[kind]] = math.prod(grids[1])
    grid = " -> ".join(f"{rows}x{columns}" for rows, columns in grids)
    why = grid if kind == "resampled" else f"the same patterns, {grid}"
    return Fate(kind, *shapes, why) if new.shape == tuple(expected) else None


def _fate_of_classes(source: Source, target: Side, there, here) -> Fate | None:
    """Class 7 of one data set is not that of another: only those of the same one are loaded."""
    if here is None:
        return Fate("dropped", there, here, "there are no labels here")
    if there is None:
        return Fate("fresh", there, here, "there are no labels there")
    if there[-1] != here[-1]:  # of another width
        return None
    if source.classes == target.classes and there == here:
        return Fate("loaded", there, here, f"the classes of {target.classes}")
    others = source.classes or "data that its config does not name"
    why = f"{here[-2]} classes of {target.classes}, there {there[-2]} of {others}"
    return Fate("fresh", there, here, why)


def _differing_fields(source: Side, target: Side) -> list[str]:
    there, here = _flow_fields(source), _flow_fields(target)
    return [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]


def _flow_fields(side: Side) -> dict[str, Any]:
    """All that both flows must have in common, by name; each value in one of its spellings."""
    section = {name: value for name, value in side.section.items() if name not in COMPUTATION}
    if depths := section.get("layers_per_block"):
        depths = [depths] if isinstance(depths, int) else list(depths)
        section["layers_per_block"] = depths * section["num_blocks"] if len(depths) == 1 else depths
    fields = {f"config.flow.{name}": value for name, value in section.items()}
    fields["the number of colour channels"] = side.flow.image_shape[2]
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


def restore(source: Source, mesh: Mesh, rules: Any) -> tuple[dict[str, Any], int]:
    """The source's variables, and the step that they come from.

    Parameters lie on the mesh as those of a training; the others, which are small, are whole on
    every device.

    Raises:
        UsageError: if there is no sound checkpoint.
    """
    abstract = dict(source.abstract)
    params = {"params": abstract.pop("params")}
    shardings = sharding.state_shardings(mesh, params, rules)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), abstract)
    place = functools.partial(
        jax.tree.map, lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    )
    wanted = {
        source.weights: place(params, shardings)["params"],
        "collections": place(abstract, whole),
    }
    with Checkpoints(source.workdir / "checkpoints") as checkpoints:
        restored, step = checkpoints.restore(wanted)
    return {"params": restored[source.weights], **restored["collections"]}, step


def initialiser(
    plan: Mapping[str, Fate],
    source: Source,
    target: Side,
    taken: Mapping[str, Any],
    create: Callable[[], TrainState],
) -> Callable[[Mapping[str, Any]], TrainState]:
    """A pure function of what `restore` gave: `create()`, with that as its variables.

    The optimizer and the step are fresh; averages start from the parameters.

    Raises:
        UsageError: if the splits of a Jet have patterns that are not known for another grid.
    """
    resampled = any(fate.fate == "resampled" for fate in plan.values())
    weights = _token_weights(source, target, taken) if resampled else []

    def initial(taken: Mapping[str, Any]) -> TrainState:
        state = create()
        fresh = {"params": state.params, **state.collections}
        old = manifest.flatten(dict(taken))
        choices = {
            "loaded": lambda path, _: old[path],
            "resampled": lambda path, _: resample.tables(old[path], weights),
            "fresh": lambda _, array: array,
        }
        flat = manifest.flatten(fresh)
        chosen = [choices[plan[path].fate](path, array) for path, array in flat.items()]
        collections = jax.tree.unflatten(jax.tree.structure(fresh), chosen)
        params = collections.pop("params")
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state.replace(params=params, collections=collections, ema=ema)

    return initial


def _token_weights(
    source: Source, target: Side, taken: Mapping[str, Any]
) -> list[Float[np.ndarray, "N T"]]:
    """The weights that resample a table with a row for each token: of a Jet, of each coupling's."""
    there, here = source.grid, target.grid
    if source.section["kind"] != "jet":
        return [resample.in_image_order(there, here)]
    couplings, kinds = source.section["num_couplings"], tuple(source.section["kinds"])
    expected = orders.splits(couplings, kinds, there, source.flow.latent_shape[1])
    stored = np.asarray(taken["constants"]["blocks_0"]["token_order"])
    if not np.array_equal(stored, expected.token_order):
        raise UsageError(
            "its constants/blocks_0/token_order are not the patterns of its config.flow.kinds, so "
            f"they cannot be had on {here[0]}x{here[1]} tokens; set what gives "
            f"{there[0]}x{there[1]}"
        )
    patterns = orders.layer_patterns(couplings, kinds)
    weights = {
        pattern: resample.on_spatial_split(pattern, there, here)
        if pattern
        else resample.in_image_order(there, here)
        for pattern in set(patterns)
    }
    return [weights[pattern] for pattern in patterns]


def describe(plan: Mapping[str, Fate], source: Source, step: int) -> str:
    """The plan as a table for a person; equal rows of numbered blocks are one."""
    groups: dict[tuple[str, Fate], list[str]] = {}
    for path, fate in plan.items():
        name = re.sub(r"\d+", "*", path.removeprefix("params/"))
        groups.setdefault((name, fate), []).append(path)
    rows = [("array", "shape", "what happens", "values")]
    for (name, fate), paths in groups.items():
        name = paths[0].removeprefix("params/") if len(paths) == 1 else f"{name} ({len(paths)})"
        why = f": {fate.why}" if fate.why else ""
        rows.append((name, _shapes(fate), fate.fate + why, f"{fate.size * len(paths):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"  {name:{widths[0]}}  {shape:{widths[1]}}  {what:{widths[2]}}  {values:>{widths[3]}}"
        for name, shape, what, values in rows
    ]
    sums = {
        fate: sum(f.size for path, f in plan.items() if f.fate == fate and "params/" in path)
        for fate in FATES
    }
    total = ", ".join(f"{size:,} {fate}" for fate, size in sums.items())
    which = "averaged weights" if source.weights == "ema" else "weights"
    return "\n".join([f"{which} of {source.workdir}, step {step}:", *lines, f"parameters: {total}"])


def _shapes(fate: Fate) -> str:
    shapes = ["x".join(map(str, shape)) for shape in (fate.there, fate.here) if shape is not None]
    return " -> ".join(dict.fromkeys(shapes))


def _shape(array: Any) -> str:
    return "absent" if array is None else "x".join(map(str, array.shape))
