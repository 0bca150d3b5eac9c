"""Sweeps: a grid of settings, its points, and their names.

A sweep is a Python file with a function `get_sweep`. A setting is named as on the command line:
`config.optim.lr` is one of the training, `guidance` or `step` a flag of sampling and evaluation.
"""

import collections
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jetflow import hosts
from jetflow.types import UsageError

LONGEST_NAME = 120  # characters; many file systems take no more than 255 bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of a setting, and what it is called."""

    value: Any
    label: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """Points in their order: of each, the settings by name."""

    points: tuple[dict[str, Choice], ...]


def axis(name: str, values: Sequence[Any] | np.ndarray | Mapping[str, Any]) -> Grid:
    """A point a value; a mapping gives label → value. NumPy's numbers become Python's.

    None stands for the default of a flag.
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
    """One of a sweep's points.

    Attributes:
        number: its place in the grid, from 0.
        choices: its settings by name.
        names: what each setting of the sweep is called.
    """

    number: int
    choices: Mapping[str, Choice]
    names: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people and files: "003,guidance=0.5,denoise=True"."""
        return f"{self.number:03d},{self._called(self.choices)}"

    @property
    def run_name(self) -> str:
        """Of the training that the point needs, which points of no other settings share."""
        return self._called(filter(is_of_training, self.choices)) or "run"

    def _called(self, settings: Iterable[str]) -> str:
        parts = (f"{self.names[name]}={quote(self.choices[name].label, '+')}" for name in settings)
        text = ",".join(parts)
        if len(text) <= LONGEST_NAME:
            return text
        return f"{text[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid, and what is measured at its points.

    Attributes:
        grid: the points.
        metrics: of `jetflow evaluate`; the table is sorted by the first.
        config: of the runs that are measured, with a path from the sweep's file; runs that differ
            in no setting of the training are one run. None if a run is always given.
        fixed: settings of all points.
        repeats: settings, such as seeds, whose values are repeats of one measurement: their mean
            and spread is shown, and no best one is chosen among them.
        pictures: samples shown of each point; 0 for none.
        title, description: the docstring of the sweep's file.
    """

    grid: Grid
    metrics: tuple[str, ...]
    config: str | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeats: tuple[str, ...] = ()
    pictures: int = 36
    title: str = ""
    description: str = ""

    @property
    def points(self) -> list[Point]:
        names = short_names(name for choices in self.grid.points for name in choices)
        return [Point(number, choices, names) for number, choices in enumerate(self.grid.points)]

    def settings(self, point: Point) -> dict[str, Any]:
        """All settings of a point; those that are None are left out."""
        chosen = {name: choice.value for name, choice in point.choices.items()}
        return {
            name: value for name, value in {**self.fixed, **chosen}.items() if value is not None
        }

    def content(self, run: str | None, recipe: dict[str, Any] | None) -> dict[str, Any]:
        """What is kept of it in the folder.

        Args:
            run: given in place of trainings, or
            recipe: the config that the points change fields of.
        """
        points = [
            {name: dataclasses.asdict(choice) for name, choice in point.choices.items()}
            for point in self.points
        ]
        fields = {
            name: getattr(self, name) for name in ("title", "description", "metrics", "repeats")
        }
        config = self.config and Path(self.config).name
        fields |= {"config": config, "run": run, "fixed": self.fixed}
        fields["recipe"] = recipe or {}
        return json.loads(json.dumps({**fields, "pictures": self.pictures, "points": points}))


def is_of_training(name: str) -> bool:
    return name.startswith("config.")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What settings are called beside each other: the shortest ends that no two of them share."""
    parts = {name: name.split(".") for name in names}
    ends = {name: [".".join(part[i:]) for i in reversed(range(len(part)))]
            for name, part in parts.items()}  # fmt: skip
    count = collections.Counter(itertools.chain.from_iterable(ends.values()))
    return {name: next((end for end in mine if count[end] == 1), name)
            for name, mine in ends.items()}  # fmt: skip


def read(path: str) -> Sweep:
    """The sweep of a file.

    Raises:
        UsageError: if there is no such file, it fails, or its grid is none.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--sweep {path} is no file; expected one such as configs/sweeps/NAME.py")
    spec = importlib.util.spec_from_file_location("_jetflow_sweep", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--sweep {path} is no Python file; expected configs/sweeps/NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_sweep = getattr(module, "get_sweep", None)
        sweep = get_sweep() if get_sweep else None
    except Exception as error:  # whatever a sweep's file raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--sweep {path}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(sweep, Sweep) or not sweep.grid.points or not sweep.metrics:
        raise UsageError(
            f"--sweep {path}: expected a function get_sweep() that returns a Sweep with points and "
            "metrics, as in configs/sweeps"
        )
    _check_points(sweep, path)
    title, _, description = (module.__doc__ or file.stem).strip().partition("\n")
    config = sweep.config
    if config is not None:
        config, colon, argument = config.partition(":")
        config = f"{file.resolve().parent.joinpath(config).resolve()}{colon}{argument}"
    description = " ".join(description.split())
    return dataclasses.replace(sweep, config=config, title=title, description=description)


def say(text: str) -> None:
    """Tell a person how the sweep is going."""
    if hosts.is_first():
        print(text, file=sys.stderr, flush=True)


def _joined(parts: Sequence[dict[str, Choice]]) -> dict[str, Choice]:
    names = [name for part in parts for name in part]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the setting {twice[0]} is on two axes; give it one")
    return {name: choice for part in parts for name, choice in part.items()}


def _check_points(sweep: Sweep, path: str) -> None:
    """Raise a UsageError unless points, and the values of a setting, differ by their labels.

    So that points, and trainings, of other settings have other names.
    """
    swept = {name for choices in sweep.grid.points for name in choices}
    if unknown := [name for name in sweep.repeats if name not in swept]:
        raise UsageError(f"--sweep {path}: repeats has {unknown[0]}, which is no axis; add one")
    labelled: dict[tuple[str, str], Any] = {}
    seen: dict[frozenset[tuple[str, str]], int] = {}
    for point in sweep.points:
        labels = [(name, choice.label) for name, choice in point.choices.items()]
        for key in labels:
            value = point.choices[key[0]].value
            if value is None and is_of_training(key[0]):
                raise UsageError(f"--sweep {path}: {key[0]} is None; give the value of a config")
            if (first := labelled.setdefault(key, value)) != value:
                raise UsageError(
                    f"--sweep {path}: {key[0]} has the values {first!r} and {value!r} under the "
                    f"label {key[1]}; give them labels that differ, as axis(name, {{label: value}})"
                )
        if (number := seen.setdefault(frozenset(labels), point.number)) != point.number:
            raise UsageError(
                f"--sweep {path}: the points {number} and {point.number} are the same; drop one"
            )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _label(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
