"""The values of a sweep's page: its table, plots over its axes, and maps with samples."""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jetflow.sweeps import short_names
from jetflow.tools.report.run_page import described, side_by_side
from jetflow.tools.sweep.store import Store
from jetflow.workdir import read_config

HIGHER_IS_BETTER = {"accuracy", "sample_accuracy", "precision", "recall", "density", "coverage"}
LACKING = "–"  # the label of a point without the setting, in a chain
MOST_LINES = 6  # of a plot
FEWEST_VALUES = 3  # of an axis with a plot

# The record of a point, with its `choices`: setting → value and label.
Point: TypeAlias = dict[str, Any]


class Axis(NamedTuple):
    """A swept setting, or several that change together; `values` by label, in the sweep's order."""

    settings: tuple[str, ...]
    name: str
    values: dict[str, Any]

    def label(self, point: Point) -> str:
        """The label of the point's value."""
        return _label(point, self.settings)


def sweep_page(path: Path) -> dict[str, Any]:
    """The values of the page of a sweep, also of one that has not ended."""
    content, records = Store(path).content(), Store(path).records()
    known = {record["number"]: record for record in records}
    unmeasured = {"name": "", "status": "not measured yet"}
    each = [
        {"metrics": {}, "errors": {}, **known.get(number, unmeasured)}
        | {"number": number, "choices": choices}
        for number, choices in enumerate(content["points"])
    ]
    repeats = content.get("repeats", ())
    points = merged(each, repeats) if repeats else each
    axes, metrics = axes_of(points), _metrics(points)
    varying = [m for m in metrics if len({_value(p, m) for p in points} - {None}) > 1] or metrics
    plotted = itertools.product(varying, [axis for axis in axes if _is_plotted(axis)])
    results = [result for record in records for result in record.get("results", [])]
    configs = (read_config(path / one["workdir"]) for one in records if "workdir" in one)
    config = next(filter(None, configs), None)
    best = _best(points, metrics[0]) if metrics else None
    return dict(
        content,
        kind="sweep",
        title=content["title"].rstrip("."),
        measured=sum(point["status"] == "done" for point in each),
        failures=[(r["name"], r["error"]) for r in records if r["status"] == "failed"],
        best=best and (_value(best, metrics[0]), [(axis.name, axis.label(best)) for axis in axes]),
        table=table(points, axes, metrics),
        each=table(each, axes_of(each), metrics) if repeats else None,
        plots=[_plot(points, axes, metric, axis) for metric, axis in plotted],
        maps=[_map(points, axes, metric, path / "points") for metric in varying if axes],
        seconds=sum(record["seconds"] for record in records),
        environments=_environments(records),
        data=_data(each),
        higher_is_better=HIGHER_IS_BETTER,
        recipe=content["config"],
        main=metrics[0] if metrics else "",
        **described(config, results),
    )


def merged(points: Sequence[Point], repeats: Sequence[str]) -> list[Point]:
    """Points that differ in `repeats` alone as one, with means and standard deviations."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        rest = {name: one for name, one in point["choices"].items() if name not in repeats}
        groups.setdefault(json.dumps(rest), []).append({**point, "choices": rest})
    return [_mean(number, group) for number, group in enumerate(groups.values())]


def _mean(number: int, group: list[Point]) -> Point:
    done = [point for point in group if point["status"] == "done"]
    values = {
        name: [value for point in done if (value := _value(point, name)) is not None]
        for name in _metrics(done)
    }
    return (done or group)[0] | {
        "number": number,
        "status": "done" if len(done) == len(group) else f"{len(done)} of {len(group)} done",
        "metrics": {name: statistics.fmean(some) for name, some in values.items() if some},
        "errors": {name: statistics.stdev(v) for name, v in values.items() if len(v) > 1},
    }


def axes_of(points: Sequence[Point]) -> list[Axis]:
    """The settings that differ among points; those that name each other's values are one axis."""
    names = list(dict.fromkeys(name for point in points for name in point["choices"]))
    groups: dict[Any, list[str]] = {}
    for name in names:
        labels = [_label(point, [name]) for point in points]
        if len(set(labels)) > 1:
            division = [(labels.index(label), label == LACKING) for label in labels]
            groups.setdefault(tuple(division), []).append(name)
    short = short_names(names)
    return [
        Axis(tuple(group), ", ".join(short[name] for name in group), {
            _label(point, group): point["choices"][group[0]]["value"]
            for point in points if group[0] in point["choices"]
        })
        for group in groups.values()
    ]  # fmt: skip


def table(points: Sequence[Point], axes: Sequence[Axis], metrics: Sequence[str]) -> dict[str, Any]:
    """The points, best first by the first metric; those without a value last."""
    ordered = _ordered(points, metrics[0]) if metrics else points
    columns: dict[str, list[Any]] = {"point": [str(point["number"]) for point in ordered]}
    for metric in metrics:
        arrow = "↑" if metric in HIGHER_IS_BETTER else "↓"
        columns[f"{metric} {arrow}"] = [_value(point, metric) for point in ordered]
        if any(spreads := [point["errors"].get(metric) for point in ordered]):
            columns[f"± of {metric}"] = spreads
    swept = {setting for axis in axes for setting in axis.settings}
    columns |= {axis.name: [axis.label(point) for point in ordered] for axis in axes}
    for fact in {"parameters", "step"} - swept:
        values = [point.get(fact) for point in ordered]
        if len(set(values) - {None}) > 1:
            columns[fact] = values
    columns["status"] = [point["status"] for point in ordered]
    best = 0 if metrics and _value(ordered[0], metrics[0]) is not None else None
    return dict(header=[*columns], rows=[*zip(*columns.values(), strict=True)], best=best)


def _data(points: Sequence[Point]) -> list[list[Any]]:
    """Every setting and metric of every point, in the order of the sweep, under a header."""
    names = list(dict.fromkeys(name for point in points for name in point["choices"]))
    metrics = _metrics(points)
    facts = [fact for fact in ("parameters", "step", "status", "error") if fact not in names]
    header = ["point", *names, *metrics, *(f"{m}_standard_error" for m in metrics), *facts]
    return [header] + [
        [point["number"]]
        + [point["choices"].get(name, {}).get("label") for name in names]
        + [point[field].get(metric) for field in ("metrics", "errors") for metric in metrics]
        + [point.get(fact) for fact in facts]
        for point in points
    ]


def _plot(points: list[Point], axes: list[Axis], metric: str, axis: Axis) -> dict[str, Any]:
    """A metric over an axis: a line for each setting of the others, or the best of them."""
    groups = _grouped(points, [other for other in axes if other is not axis])
    many = len(groups) > MOST_LINES
    lines = {}
    for name, group in ({"best": points} if many else groups).items():
        bests = {label: _best(some, metric) for label, some in _grouped(group, [axis]).items()}
        lines[name] = sorted(
            (axis.values[label], _value(best, metric))
            for label, best in bests.items()
            if best and label in axis.values
        )
    return dict(metric=metric, axis=axis.name, lines=lines, many=many)


def _map(points: list[Point], axes: list[Axis], metric: str, pictures: Path) -> dict[str, Any]:
    """All points: the axis of most values in columns, all others in rows."""
    wide = max(axes, key=lambda axis: len(axis.values))
    rest = [axis for axis in axes if axis is not wide]
    columns = dict.fromkeys([*wide.values, *map(wide.label, points)])
    rows = [
        (name, [{wide.label(point): point for point in group}.get(c) for c in columns])
        for name, group in _grouped(points, rest).items()
    ]
    best = _best(points, metric)
    values = [value for point in points if (value := _value(point, metric)) is not None]
    names = ", ".join(axis.name for axis in rest)
    return dict(
        metric=metric,
        header=[f"{names} ↓ {wide.name} →" if rest else f"{wide.name} →", *columns],
        rows=rows,
        best=best and _value(best, metric),
        low=min(values, default=0),
        high=max(values, default=0),
        pictures={path.stem: path for path in pictures.glob("*.png")},
    )


def _environments(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The environments of the points, each under the points that were measured in it."""
    known: dict[str, list[int]] = {}
    for record in records:
        known.setdefault(json.dumps(record["environment"]), []).append(record["number"])
    return side_by_side(
        {f"{len(n)} points from {n[0]} on": json.loads(t) for t, n in known.items()}
    )


def _is_plotted(axis: Axis) -> bool:
    numbers = [v for v in axis.values.values() if isinstance(v, int | float)]
    return FEWEST_VALUES <= len(numbers) == len(axis.values)


def _grouped(points: Sequence[Point], axes: Sequence[Axis]) -> dict[str, list[Point]]:
    """The points by their labels on some axes."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        named = [f"{axis.name} {axis.label(point)}" for axis in axes]
        label = ", ".join(named) if len(axes) > 1 else "".join(axis.label(point) for axis in axes)
        groups.setdefault(label, []).append(point)
    return groups


def _ordered(points: Sequence[Point], metric: str) -> list[Point]:
    """Points from the best value on; those without one last."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    values = [(_value(point, metric), point) for point in points]
    rank = lambda one: (one[0] is None, sign * (one[0] or 0))  # noqa: E731
    return [point for _, point in sorted(values, key=rank)]


def _best(points: Sequence[Point], metric: str) -> Point | None:
    """The point with the best value; None if none has a value."""
    return next((p for p in _ordered(points, metric) if _value(p, metric) is not None), None)


def _metrics(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point["metrics"]))


def _value(point: Point, metric: str) -> int | float | None:
    return point["metrics"].get(metric)


def _label(point: Point, settings: Sequence[str]) -> str:
    choices = point["choices"]
    return ", ".join(choices[name]["label"] if name in choices else LACKING for name in settings)
