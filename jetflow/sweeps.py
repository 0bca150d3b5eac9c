"""Sweeps: a grid of settings, its points, and their names.

A sweep is a Python file with a function `get_sweep`. A setting is a field of the config, such as
`config.optim.lr`, or an option of evaluation and sampling, such as `guidance` or `step`.
"""

import ast
import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jetflow.configs import call, located
from jetflow.options import Options, option
from jetflow.types import UsageError

LONGEST_NAME = 120  # characters; many file systems take no more than 255 bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of a setting, and its label."""

    value: Any
    label: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """Points in their order: of each, the settings by name."""

    points: tuple[dict[str, Choice], ...]


def axis(name: str, values: Sequence[Any] | np.ndarray | Mapping[str, Any]) -> Grid:
    """A point a value; a mapping gives label → value. NumPy's numbers become Python's.

    None stands for the default of an option.
    """
    if isinstance(values, Mapping):
        named = {label: _plain(value) for label, value in values.items()}
    else:
        values = [_plain(value) for value in values]
        named = {_label(value): value for value in values}
        if len(named) < len(values):
            raise UsageError(f"the axis {name} has a value twice in {list(values)}; drop one")
    return Grid(tuple({name: Choice(value, label)} for label, value in named.items()))


def product(*grids: Grid) -> Grid:
    """Each point of one grid with each of the others; the last one varies fastest."""
    combinations = itertools.product(*(grid.points for grid in grids))
    return Grid(tuple(map(_joined, combinations)))


def together(*grids: Grid) -> Grid:
    """The first point of each grid as one point, then the second of each, and so on."""
    lengths = [len(grid.points) for grid in grids]
    if len(set(lengths)) > 1:
        raise UsageError(f"together() has grids of {lengths} points; give grids of one length")
    return Grid(tuple(map(_joined, zip(*(grid.points for grid in grids), strict=True))))


def chain(*grids: Grid) -> Grid:
    """The points of one grid after those of another."""
    return Grid(tuple(itertools.chain.from_iterable(grid.points for grid in grids)))


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a sweep.

    Attributes:
        number: its place in the grid, from 0.
        choices: its settings by name.
        names: the short name of each setting of the sweep.
    """

    number: int
    choices: Mapping[str, Choice]
    names: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people and files: "003,guidance=0.5,denoise=True"."""
        return f"{self.number:03d},{self._listed(self.choices)}"

    @property
    def run_name(self) -> str:
        """The name of its training; points that differ in no field of the config share one."""
        return self._listed(filter(is_of_training, self.choices)) or "run"

    def _listed(self, settings: Iterable[str]) -> str:
        parts = (f"{self.names[name]}={quote(self.choices[name].label, '+')}" for name in settings)
        text = ",".join(parts)
        if len(text) <= LONGEST_NAME:
            return text
        return f"{text[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Sweep(Options):
    """A grid, and what is measured at its points.

    Attributes:
        grid: the points.
        metrics: of `jetflow evaluate`; the table is sorted by the first.
        config: of the runs that are measured, with a path from the sweep's file; runs that differ
            in no setting of the training are one run. None if a run is always given.
        fixed: settings of all points.
        repeats: settings, such as seeds, whose values repeat one measurement: the page shows its
            mean and spread, and marks the best mean.
        pictures: samples shown of each point; 0 for none.
        title, description: the docstring of the sweep's file.

    Raises:
        UsageError: if points, or the values of a setting, do not differ by their labels: points
            and trainings are named by these.
    """

    grid: Grid = option()
    metrics: tuple[str, ...] = option()
    config: str | None = option(None)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeats: tuple[str, ...] = option(())
    pictures: int = option(36, least=0)
    title: str = "Sweep"
    description: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not self.grid.points:
            raise UsageError("the sweep has no points; give some values of an axis")
        swept = {name for choices in self.grid.points for name in choices}
        if unknown := [name for name in self.repeats if name not in swept]:
            raise UsageError(f"repeats has {unknown[0]}, which is no axis; add one")
        values: dict[tuple[str, str], Any] = {}
        numbers: dict[frozenset[tuple[str, str]], int] = {}
        for number, choices in enumerate(self.grid.points):
            for name, choice in choices.items():
                if choice.value is None and is_of_training(name):
                    raise UsageError(f"{name} is None; give the value of a config")
                if (value := values.setdefault((name, choice.label), choice.value)) != choice.value:
                    raise UsageError(
                        f"{name} has the values {value!r} and {choice.value!r} under the label "
                        f"{choice.label}; give others, as in axis(name, {{label: value}})"
                    )
            labels = frozenset((name, choice.label) for name, choice in choices.items())
            if (first := numbers.setdefault(labels, number)) != number:
                raise UsageError(f"the points {first} and {number} are the same; drop one")

    @property
    def points(self) -> list[Point]:
        names = short_names(name for choices in self.grid.points for name in choices)
        return [Point(number, choices, names) for number, choices in enumerate(self.grid.points)]

    def settings(self, point: Point) -> dict[str, Any]:
        """All settings of a point; those that are None are left out."""
        chosen = {name: choice.value for name, choice in point.choices.items()}
        merged = {**self.fixed, **chosen}
        return {name: value for name, value in merged.items() if value is not None}

    def with_fixed(self, settings: Mapping[str, Any]) -> "Sweep":
        """The sweep with these settings at all points, in place of its own fixed ones.

        Raises:
            UsageError: if all points have an axis of that name.
        """
        for name in settings:
            if all(name in choices for choices in self.grid.points):
                raise UsageError(f"fix has {name}, which is swept; take it off the sweep's axes")
        return dataclasses.replace(self, fixed={**self.fixed, **settings})

    def chosen(self, shard: tuple[int, int] | None, point: int | None) -> list[Point]:
        """Every n-th point from the i-th on for a shard (i, n), or the point of a number."""
        index, count = shard or (0, 1)
        if not 0 <= index < count:
            raise UsageError(f"shard is {index}/{count}; expected I/N with I from 0 to N - 1")
        if point is not None and not 0 <= point < len(self.points):
            raise UsageError(f"point is {point}; expected 0 to {len(self.points) - 1}")
        return self.points[index::count] if point is None else [self.points[point]]

    def content(self, run: str | None, recipe: dict[str, Any]) -> dict[str, Any]:
        """The record of the sweep in its folder.

        Args:
            run: the workdir that is measured, or
            recipe: the config that the points change fields of.
        """
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["points"] = [
            {name: dataclasses.asdict(choice) for name, choice in choices.items()}
            for choices in content.pop("grid").points
        ]
        content |= {"config": self.config and Path(self.config).name}
        content |= {"run": run, "recipe": recipe}
        return json.loads(json.dumps(content, default=str))


def is_of_training(name: str) -> bool:
    return name.startswith("config.")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names of settings beside each other: the shortest ends that no two of them share."""
    parts = {name: name.split(".") for name in names}
    ends = {name: [".".join(part[i:]) for i in reversed(range(len(part)))]
            for name, part in parts.items()}  # fmt: skip
    count = collections.Counter(itertools.chain.from_iterable(ends.values()))
    return {name: next((end for end in mine if count[end] == 1), name)
            for name, mine in ends.items()}  # fmt: skip


def read(path: str | Path) -> Sweep:
    """The sweep of a file, with its docstring and the full path of its config.

    Raises:
        UsageError: if there is no such file, it fails (with the line), or makes no sweep.
    """
    path = located(str(path))
    sweep, file = call("sweep", path, "get_sweep"), Path(path).resolve()
    if not isinstance(sweep, Sweep):
        raise UsageError(f"--sweep {path} has a get_sweep that returns no Sweep")
    title, *lines = (ast.get_docstring(ast.parse(file.read_text())) or file.stem).split("\n")
    config = sweep.config and str((file.parent / sweep.config).resolve())
    description = " ".join(" ".join(lines).split())
    return dataclasses.replace(sweep, config=config, title=title, description=description)


def _joined(parts: Sequence[dict[str, Choice]]) -> dict[str, Choice]:
    names = [name for part in parts for name in part]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the setting {twice[0]} is on two axes; give it one")
    return {name: choice for part in parts for name, choice in part.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _label(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
