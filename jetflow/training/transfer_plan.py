"""What a training that starts from another run's weights takes of them, decided from shapes alone.

The two flows may differ in the height and width of their images and in their classes, in nothing
else. Every array gets one of four fates: loaded as it is; resampled, where it has values for each
token and the grid of tokens differs; fresh, as at the start of any training; or dropped.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jetflow import manifest
from jetflow.flows.build import with_defaults
from jetflow.types import Flow, UsageError

FATES = ("loaded", "resampled", "fresh", "dropped")
# What has values for each token, which depend on the grid of tokens.
OF_TOKENS = {"position": "resampled", "variance": "resampled", "token_order": "fresh"}
# Data sets of other names with the same classes in the same order.
SAME_CLASSES = {"imagenet32_new": "imagenet64_new", "afhq_v2": "afhq"}
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
        name = re.sub(r"/\d+$", "", self.data)
        return SAME_CLASSES.get(name, name)


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
    section = with_defaults(side.section)
    section = {name: value for name, value in section.items() if name not in COMPUTATION}
    if depths := section.get("layers_per_block"):
        depths = [depths] if isinstance(depths, int) else list(depths)
        section["layers_per_block"] = depths * section["num_blocks"] if len(depths) == 1 else depths
    fields = {f"config.flow.{name}": value for name, value in section.items()}
    fields["the number of colour channels"] = side.flow.image_shape[2]
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


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
