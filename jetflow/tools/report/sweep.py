"""The page of a sweep: its table, what each setting does, samples at the points."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jetflow.tools.report.axes import LACKING, Axis
from jetflow.tools.report.content import (
    Block,
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
from jetflow.tools.report.found import Found, direction, is_better_higher
from jetflow.tools.report.repeats import merged
from jetflow.tools.report.run import config_blocks, data_blocks, network_blocks
from jetflow.tools.sweep.folder import Folder
from jetflow.workdir import flat, read_config

MOST_LINES = 6  # in a plot, and rows of a map of all points
FEWEST_VALUES = 3  # of an axis that is plotted as one


def sweep_page(path: Path) -> Page:
    """What there is in the folder of a sweep, also of one that has not ended."""
    folder = Folder(path)
    content, records = folder.content(), folder.records()
    each = Found(path, content["points"], records)
    repeats = content.get("repeats", ())
    found = Found(path, *merged(content["points"], records, repeats)) if repeats else each
    table = found.table()
    failed = sum(record["status"] == "failed" for record in records)
    summary = f"{len(records) - failed} of {len(content['points'])} points measured"
    summary += f", {failed} failed" if failed else ""
    summary += found.winner("best mean" if repeats else "best")
    sections = [
        Section(
            "Table", [*_prose(content["description"]), *_means(repeats), table, *_networks(records)]
        ),
        Section("Repeats", [each.table()] if repeats else [], folded=True),
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
        data=each.data(),
        table=table,
    )


def _plots(found: Found) -> Iterator[Lines]:
    """Each metric over each axis of numbers: a line for each setting of the rest."""
    for metric, axis in itertools.product(found.varying, found.axes):
        if len(axis.numbers) < FEWEST_VALUES:
            continue
        rest = [other for other in found.axes if other is not axis]
        groups = _grouped(found.points, rest)
        caption = f"{direction(metric).capitalize()}."
        if len(groups) > MOST_LINES:
            groups = {"best of the rest": list(range(len(found.points)))}
            caption += f" Of all other settings, the best at each {axis.name}."
        lines = {name: _line(found, metric, axis, group) for name, group in groups.items()}
        series = [Series(name, line) for name, line in lines.items() if line]
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
    if not found.varying or not found.axes:
        return
    main = found.varying[0]
    wide = max(found.axes, key=lambda axis: len(axis.labels))
    rest = [axis for axis in found.axes if axis is not wide]
    caption = "Brighter is higher; {}, and ★ marks the best."
    for metric in found.varying:
        groups = _grouped(found.points, rest)
        samples = " The same prior noise at every point." if metric == main else ""
        yield _map(
            found, metric, wide, ", ".join(axis.name for axis in rest), groups,
            f"{metric}: all points", caption.format(direction(metric)) + samples,
            pictures=metric == main,
        )  # fmt: skip
        pairs = itertools.combinations(found.axes, 2) if len(found.axes) > 2 else ()
        for one, other in pairs:
            x, y = (one, other) if len(one.labels) >= len(other.labels) else (other, one)
            yield _map(
                found, metric, x, y.name, _grouped(found.points, [y]),
                f"{metric}: {x.name} and {y.name}",
                f"At the best of the other settings. {caption.format(direction(metric))}",
                pictures=False,
            )  # fmt: skip


def _map(
    found: Found, metric: str, x: Axis, y: str, groups: dict[str, list[int]], title: str,
    caption: str, *, pictures: bool,
) -> HeatMap:  # fmt: skip
    lacking = any(x.place(point) < 0 for point in found.points)
    columns = [*x.labels, *([LACKING] if lacking else [])]
    spots = []
    for group in groups.values():
        row = []
        for column in columns:
            inside = [i for i in group if x.label(found.points[i]) == column]
            best = found.best(inside, metric)
            chosen = best if best is not None else next(iter(inside), None)
            spot = None if chosen is None else found.spot(chosen, metric)
            row.append(Spot(spot.value, spot.note) if spot and not pictures else spot)
        spots.append(row)
    higher = is_better_higher(metric)
    return HeatMap(title, x.name, y, columns, list(groups), spots, higher, caption)


def _grouped(points: Sequence[dict[str, Any]], rest: Sequence[Axis]) -> dict[str, list[int]]:
    """The points of each setting of some axes, by its name."""
    groups: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        several = len(rest) > 1
        names = [f"{axis.name} {axis.label(point)}" if several else axis.label(point)
                 for axis in rest]  # fmt: skip
        groups.setdefault(", ".join(names), []).append(index)
    return groups


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
    blocks += config_blocks(first, differing)
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


def _means(repeats: Sequence[str]) -> list[Block]:
    if not repeats:
        return []
    return [Prose(f"Each value is the mean of the points that differ in {', '.join(repeats)} alone,"
                  " and ± is their standard deviation.")]  # fmt: skip


def _prose(text: str) -> list[Block]:
    return [Prose(text)] if text else []
