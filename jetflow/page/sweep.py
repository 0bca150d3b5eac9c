"""The page of a sweep: its table, what each setting does, samples at the points."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jetflow.page.axes import Axis, axes
from jetflow.page.content import (
    Block,
    Cell,
    HeatMap,
    Lines,
    Number,
    Page,
    Prose,
    Section,
    Series,
    Spot,
    Table,
    number,
)
from jetflow.page.run import config_blocks, data_blocks, network_blocks
from jetflow.sweeps import Folder
from jetflow.workdir import flat, read_config

HIGHER_IS_BETTER = {"accuracy", "sample_accuracy", "precision", "recall", "density", "coverage"}
MOST_LINES = 6  # in a plot, and rows of a map of all points
FEWEST_VALUES = 3  # of an axis that is plotted as one


def sweep_page(path: Path) -> Page:
    """What there is in the folder of a sweep, also of one that has not ended."""
    folder = Folder(path)
    content, records = folder.content(), folder.records()
    swept = axes(content["points"])
    found = Found(path, content, records, swept)
    table = found.table()
    failed = sum(record["status"] == "failed" for record in records)
    summary = f"{len(records) - failed} of {len(content['points'])} points measured"
    summary += f", {failed} failed" if failed else ""
    summary += found.winner()
    sections = [
        Section("Table", [*_prose(content["description"]), table, *_networks(records)]),
        Section("Effects", [*_plots(found)]),
        Section("Maps", [*_maps(found)]),
        Section("Failures", _failures(records)),
        Section("Settings", _settings(content, records, path)),
        Section("Data", _data(path, records)),
        Section("Environment", _environment(records)),
    ]
    return Page(
        title=content["title"].rstrip("."),
        summary=summary,
        sections=[section for section in sections if section.blocks],
        data=found.data(),
        table=table,
    )


class Found:
    """What a sweep has found, by point and metric."""

    def __init__(self, path: Path, content: dict, records: list[dict], swept: list[Axis]):
        self.points: list[dict[str, Any]] = content["points"]
        self.axes = swept
        self._path = path
        self._records = {record["number"]: record for record in records}
        done = [record for record in records if record["status"] == "done"]
        self.metrics = list(dict.fromkeys(name for record in done for name in record["metrics"]))

    def value(self, index: int, metric: str) -> Number | None:
        """Of a point; None where it has none, or none that is finite."""
        return self._records.get(index, {}).get("metrics", {}).get(metric)

    def spot(self, index: int, metric: str, note: str = "") -> Spot:
        """A point's value with its samples."""
        record = self._records.get(index, {"status": "not measured yet"})
        picture = self._path / "points" / f"{record.get('name')}.png"
        value = self.value(index, metric)
        if value is None:
            note = record["status"]
        return Spot(value, note, picture if picture.exists() else None)

    def order(self, indices: Sequence[int], metric: str) -> list[int]:
        """Points from the best value on; those without one last."""
        sign = -1 if is_better_higher(metric) else 1
        values = {i: self.value(i, metric) for i in indices}
        valued = [i for i in indices if values[i] is not None]
        return sorted(valued, key=lambda i: (sign * (values[i] or 0), i)) + [
            i for i in indices if values[i] is None
        ]

    def best(self, indices: Sequence[int], metric: str) -> int | None:
        """The point with the best value."""
        first = next(iter(self.order(indices, metric)), None)
        return None if first is None or self.value(first, metric) is None else first

    def winner(self) -> str:
        """ ": the best fid is 3.2, at guidance 1"; empty before there is one."""
        main = self.metrics[0] if self.metrics else ""
        best = self.best(range(len(self.points)), main)
        if best is None:
            return ""
        value = number(self.value(best, main) or 0.0)
        where = ", ".join(f"{axis.name} {_label(axis, self.points[best])}" for axis in self.axes)
        return f"; the best {main} is {value}, at {where}" if where else ""

    def table(self) -> Table:
        """The points, best first by the first metric; those without a value last."""
        main = self.metrics[0] if self.metrics else ""
        order = self.order(range(len(self.points)), main)
        sizes = {i: self._records.get(i, {}).get("parameters") for i in order}
        sized = len({size for size in sizes.values() if size is not None}) > 1
        header = ["point", *self._headings(), *(axis.name for axis in self.axes)]
        header += [*(["parameters"] if sized else []), "status"]
        rows: list[list[Cell]] = []
        for i in order:
            row: list[Cell] = [str(i)]
            row += [cell for metric in self.metrics for cell in self._cells(i, metric)]
            row += [_label(axis, self.points[i]) for axis in self.axes]
            rows.append([*row, *([sizes[i]] if sized else []), self._status(i)])
        ordered = f"Sorted by {main}, {_direction(main)}; the best row is marked." if main else ""
        marked = 0 if main and self.value(order[0], main) is not None else None
        return Table(header, rows, ordered, marked)

    def data(self) -> Table:
        """Every setting and metric of every point, in the order of the sweep."""
        names = list(dict.fromkeys(name for point in self.points for name in point))
        errors = [f"{metric}_standard_error" for metric in self.metrics]
        header = ["point", *names, *self.metrics, *errors, "parameters", "status", "error"]
        rows: list[list[Cell]] = []
        for i, point in enumerate(self.points):
            record = self._records.get(i, {})
            row: list[Cell] = [
                i,
                *(point[name]["label"] if name in point else None for name in names),
            ]
            row += [self.value(i, metric) for metric in self.metrics]
            row += [record.get("errors", {}).get(metric) for metric in self.metrics]
            rows.append([*row, record.get("parameters"), self._status(i), record.get("error")])
        return Table(header, rows)

    def _headings(self) -> Iterator[str]:
        for metric in self.metrics:
            yield f"{metric} {'↑' if is_better_higher(metric) else '↓'}"
            if self._has_errors(metric):
                yield "±"

    def _cells(self, index: int, metric: str) -> Iterator[Cell]:
        yield self.value(index, metric)
        if self._has_errors(metric):
            yield self._records.get(index, {}).get("errors", {}).get(metric)

    def _has_errors(self, metric: str) -> bool:
        return any(record.get("errors", {}).get(metric) for record in self._records.values())

    def _status(self, index: int) -> str:
        return self._records.get(index, {"status": "not measured yet"})["status"]


def is_better_higher(metric: str) -> bool:
    return metric in HIGHER_IS_BETTER


def _direction(metric: str) -> str:
    return "higher is better" if is_better_higher(metric) else "lower is better"


def _plots(found: Found) -> Iterator[Lines]:
    """Each metric over each axis of numbers: a line for each setting of the rest."""
    for metric, axis in itertools.product(found.metrics, found.axes):
        if len(axis.numbers) < FEWEST_VALUES:
            continue
        rest = [other for other in found.axes if other is not axis]
        groups = _grouped(found.points, rest)
        caption = f"{_direction(metric).capitalize()}."
        if len(groups) > MOST_LINES:
            groups = {"best of the rest": list(range(len(found.points)))}
            caption += f" Of all other settings, the best at each {axis.name}."
        series = [Series(name, _line(found, metric, axis, group)) for name, group in groups.items()]
        yield Lines(f"{metric} over {axis.name}", axis.name, metric, series, caption)


def _line(found: Found, metric: str, axis: Axis, group: list[int]) -> list[tuple[Number, Number]]:
    points = []
    for place, x in enumerate(axis.numbers):
        best = found.best([i for i in group if axis.place(found.points[i]) == place], metric)
        if best is not None:
            value = found.value(best, metric)
            assert value is not None
            points.append((x, value))
    return sorted(points)


def _maps(found: Found) -> Iterator[Block]:
    """All points with their samples, then each pair of axes at the best of the rest."""
    if not found.metrics or not found.axes:
        return
    main = found.metrics[0]
    wide = max(found.axes, key=lambda axis: len(axis.labels))
    rest = [axis for axis in found.axes if axis is not wide]
    caption = "Brighter is higher; {}, and ★ marks the best."
    for metric in found.metrics:
        groups = _grouped(found.points, rest)
        samples = " The same prior noise at every point." if metric == main else ""
        yield _map(
            found, metric, wide, ", ".join(axis.name for axis in rest), groups,
            f"{metric}: all points", caption.format(_direction(metric)) + samples,
            pictures=metric == main,
        )  # fmt: skip
        pairs = itertools.combinations(found.axes, 2) if len(found.axes) > 2 else ()
        for one, other in pairs:
            x, y = (one, other) if len(one.labels) >= len(other.labels) else (other, one)
            yield _map(
                found, metric, x, y.name, _grouped(found.points, [y]),
                f"{metric}: {x.name} and {y.name}",
                f"At the best of the other settings. {caption.format(_direction(metric))}",
                pictures=False,
            )  # fmt: skip


def _map(
    found: Found, metric: str, x: Axis, y: str, groups: dict[str, list[int]], title: str,
    caption: str, *, pictures: bool,
) -> HeatMap:  # fmt: skip
    spots = []
    for group in groups.values():
        row = []
        for place in range(len(x.labels)):
            inside = [i for i in group if x.place(found.points[i]) == place]
            best = found.best(inside, metric)
            chosen = best if best is not None else next(iter(inside), None)
            spot = None if chosen is None else found.spot(chosen, metric)
            row.append(Spot(spot.value, spot.note) if spot and not pictures else spot)
        spots.append(row)
    higher = is_better_higher(metric)
    return HeatMap(title, x.name, y, x.labels, list(groups), spots, higher, caption)


def _grouped(points: Sequence[dict[str, Any]], rest: Sequence[Axis]) -> dict[str, list[int]]:
    """The points of each setting of some axes, by its name."""
    groups: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        several = len(rest) > 1
        names = [f"{axis.name} {_label(axis, point)}" if several else _label(axis, point)
                 for axis in rest]  # fmt: skip
        groups.setdefault(", ".join(names), []).append(index)
    return groups


def _label(axis: Axis, point: dict[str, Any]) -> str:
    place = axis.place(point)
    return axis.labels[place] if place >= 0 else "–"


def _failures(records: list[dict[str, Any]]) -> list[Block]:
    rows = [(r["name"], r["error"]) for r in records if r["status"] == "failed"]
    caption = "The same `jetflow sweep` command tries these points again."
    return [Table(("point", "error"), rows, caption)] if rows else []


def _settings(content: dict, records: list[dict], path: Path) -> list[Block]:
    """What all points share, and where the configs of their runs differ."""
    source = f"the run {content['run']}" if content["run"] else f"runs of {content['config']}"
    blocks: list[Block] = [Prose(f"Measured: {', '.join(content['metrics'])} of {source}.")]
    if content["fixed"]:
        rows = [(name, str(value)) for name, value in content["fixed"].items()]
        blocks.append(Table(("setting of all points", "value"), rows))
    configs = _configs(path, records)
    if not configs:
        return blocks
    first = next(iter(configs.values()))
    leaves = {name: flat(config) for name, config in configs.items()}
    names = dict.fromkeys(itertools.chain.from_iterable(leaves.values()))
    differing = [n for n in names if len({str(one.get(n)) for one in leaves.values()}) > 1]
    if differing:
        rows = [(run, *(str(one.get(n)) for n in differing)) for run, one in leaves.items()]
        header = ("run", *(n.removeprefix("config.") for n in differing))
        blocks.append(Table(header, rows, "Where the configs of the runs differ."))
    blocks += config_blocks({name: part for name, part in first.items()}, differing)
    return blocks


def _data(path: Path, records: list[dict[str, Any]]) -> list[Block]:
    config = next(iter(_configs(path, records).values()), None)
    results = [result for record in records for result in record.get("results", [])]
    return data_blocks(config, results) if config else []


def _networks(records: list[dict[str, Any]]) -> list[Block]:
    return network_blocks([result for record in records for result in record.get("results", [])])


def _configs(path: Path, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The configs of the runs that were measured, by their folders."""
    folders = dict.fromkeys(record["workdir"] for record in records if "workdir" in record)
    found = {Path(folder).name: read_config(path / folder) for folder in folders}
    return {name: config for name, config in found.items() if config is not None}


def _environment(records: list[dict[str, Any]]) -> list[Block]:
    """What the points were measured with, a column for each environment."""
    known: dict[str, list[int]] = {}
    for record in records:
        known.setdefault(json.dumps(record["environment"]), []).append(record["number"])
    if not known:
        return []
    columns = [json.loads(text) for text in known]
    header = ["", *(f"{len(numbers)} points" for numbers in known.values())]
    seconds = sum(record["seconds"] for record in records)
    took = f"The points took {number(seconds, 3)} seconds in all, with the trainings they needed."
    rows = [[name, *(str(one.get(name, "–")) for one in columns)] for name in columns[0]]
    return [Table(header, rows, took)]


def _prose(text: str) -> list[Block]:
    return [Prose(text)] if text else []
