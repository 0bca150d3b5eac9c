"""The values of a sweep's page: its table, plots over its axes, and maps with samples."""

import itertools
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from jetflow.buckets import AnyPath
from jetflow.sweeps import short_names
from jetflow.tools.report.run_page import described, side_by_side
from jetflow.tools.sweep.store import Store
from jetflow.types import UsageError
from jetflow.workdir import read_config

HIGHER_IS_BETTER = {
    "accuracy",
    "accuracy_gradient",
    "sample_accuracy",
    "precision",
    "recall",
    "density",
    "coverage",
}
LACKING = "–"  # the label of a point without the setting, in a chain
MOST_LINES = 6  # of a plot
FEWEST_VALUES = 3  # of an axis with a plot

# The record of a point, with its `choices`: setting → value and label.
Point: TypeAlias = dict[str, Any]


class Axis(NamedTuple):
    """A swept setting, or several that change together; `values` by label, in the sweep's order."""

    settings: tuple[str, ...]
    name: str = ""
    values: dict[str, Any] = {}  # noqa: RUF012

    def label(self, point: Point) -> str:
        """The label of the point's value."""
        choices = point["choices"]
        return ", ".join(choices[n]["label"] if n in choices else LACKING for n in self.settings)


def sweep_page(path: AnyPath) -> dict[str, Any]:
    """The values of the page of a sweep, also of one that has not ended."""
    content, (records, damaged) = Store(path).content(), Store(path).scan()
    known = {record["number"]: record for record in records}
    unmeasured = {"name": "", "status": "not measured yet"}
    each = [
        {"metrics": {}, "errors": {}, **known.get(number, unmeasured)}
        | {"number": number, "choices": choices}
        for number, choices in enumerate(content["points"])
    ]
    repeats = content["repeats"]
    points = merged(each, repeats) if repeats else each
    axes, metrics = axes_of(points), metrics_of(points)
    varying = [m for m in metrics if len({p["metrics"].get(m) for p in points} - {None}) > 1]
    varying = varying or metrics
    plotted = [axis for axis in axes if len(axis.values) >= FEWEST_VALUES
               and all(isinstance(one, int | float) for one in axis.values.values())]  # fmt: skip
    environments: dict[str, list[int]] = {}
    for record in records:
        environments.setdefault(json.dumps(record["environment"]), []).append(record["number"])
    config = None
    for workdir in dict.fromkeys(one["workdir"] for one in records if "workdir" in one):
        try:
            config = config or read_config(path / workdir)
        except UsageError as error:
            damaged.append(str(error))
    return dict(
        content,
        kind="sweep",
        damaged=damaged,
        title=content["title"].rstrip("."),
        recipe=content["config"],
        main=metrics[0] if metrics else "",
        axes=[axis.name for axis in axes],
        measured=sum(point["status"] == "done" for point in each),
        failures=[(r["name"], r.get("error")) for r in records if r["status"] == "failed"],
        table=table(points, axes, metrics),
        each=table(each, axes_of(each), metrics) if repeats else None,
        plots=[_plot(points, axes, *pair) for pair in itertools.product(varying, plotted)],
        maps=[_map(points, axes, metric, path / "points") for metric in varying if axes],
        seconds=sum(record["seconds"] for record in records),
        environments=side_by_side(
            {f"{len(n)} points from {n[0]} on": json.loads(e) for e, n in environments.items()}
        ),
        data=_data(each),
        direction={
            m: f"{'higher' if m in HIGHER_IS_BETTER else 'lower'} is better" for m in metrics
        },
        **described(config, [result for record in records for result in record.get("results", [])]),
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
        name: [value for point in done if (value := point["metrics"].get(name)) is not None]
        for name in metrics_of(done)
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
        labels = [Axis((name,)).label(point) for point in points]
        if len(set(labels)) > 1:
            division = [(labels.index(label), label == LACKING) for label in labels]
            groups.setdefault(tuple(division), []).append(name)
    short, axes = short_names(names), []
    for group in groups.values():
        having = [point for point in points if group[0] in point["choices"]]
        axis = Axis(tuple(group), ", ".join(short[name] for name in group))
        values = {axis.label(point): point["choices"][group[0]]["value"] for point in having}
        axes.append(axis._replace(values=values))
    return axes


def metrics_of(points: Sequence[Point]) -> list[str]:
    """The metrics that points have, in their order."""
    return list(dict.fromkeys(name for point in points for name in point["metrics"]))


def ordered(points: Sequence[Point], metric: str) -> list[Point]:
    """Points from the best value on; those without one last."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    valued = [point for point in points if point["metrics"].get(metric) is not None]
    rest = [point for point in points if point["metrics"].get(metric) is None]
    return sorted(valued, key=lambda point: sign * point["metrics"][metric]) + rest


def grouped(points: Sequence[Point], axes: Sequence[Axis]) -> dict[str, list[Point]]:
    """The points by their labels on some axes."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        labels = [f"{axis.name} {axis.label(point)}" for axis in axes]
        name = axes[0].label(point) if len(axes) == 1 else ", ".join(labels)
        groups.setdefault(name, []).append(point)
    return groups


def table(points: Sequence[Point], axes: Sequence[Axis], metrics: Sequence[str]) -> dict[str, Any]:
    """The points, best first by the first metric; those without a value last."""
    points = ordered(points, metrics[0]) if metrics else points
    columns: dict[str, list[Any]] = {"point": [str(point["number"]) for point in points]}
    for metric in metrics:
        arrow = "↑" if metric in HIGHER_IS_BETTER else "↓"
        columns[f"{metric} {arrow}"] = [point["metrics"].get(metric) for point in points]
        if any(spreads := [point["errors"].get(metric) for point in points]):
            columns[f"± of {metric}"] = spreads
    columns |= {axis.name: [axis.label(point) for point in points] for axis in axes}
    for fact in {"parameters", "step"} - {name for axis in axes for name in axis.settings}:
        if len({point.get(fact) for point in points} - {None}) > 1:
            columns[fact] = [point.get(fact) for point in points]
    columns["status"] = [point["status"] for point in points]
    best = 0 if metrics and points[0]["metrics"].get(metrics[0]) is not None else None
    return dict(header=[*columns], rows=[*zip(*columns.values(), strict=True)], best=best)


def _data(points: Sequence[Point]) -> list[list[Any]]:
    """Every setting and metric of every point, in the order of the sweep, under a header."""
    rows = [
        {"point": point["number"]}
        | {name: one["label"] for name, one in point["choices"].items()}
        | point["metrics"]
        | {f"{name}_standard_error": value for name, value in point["errors"].items()}
        | {name: point.get(name) for name in ("parameters", "step", "status", "error")}
        for point in points
    ]
    header = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    return [header, *([row.get(name) for name in header] for row in rows)]


def _plot(points: list[Point], axes: list[Axis], metric: str, axis: Axis) -> dict[str, Any]:
    """A metric over an axis: a line for each setting of the others, or the best of them."""
    groups = grouped(points, [other for other in axes if other is not axis])
    many = len(groups) > MOST_LINES
    lines = {}
    for name, group in ({"best": points} if many else groups).items():
        bests = {n: ordered(some, metric)[0] for n, some in grouped(group, [axis]).items()}
        pairs = [(axis.values.get(n), best["metrics"].get(metric)) for n, best in bests.items()]
        lines[name] = sorted(pair for pair in pairs if None not in pair)
    return dict(metric=metric, axis=axis.name, lines=lines, many=many)


def _map(points: list[Point], axes: list[Axis], metric: str, pictures: AnyPath) -> dict[str, Any]:
    """All points: the axis of most values in columns, all others in rows."""
    wide = max(axes, key=lambda axis: len(axis.values))
    rest = [axis for axis in axes if axis is not wide]
    columns = dict.fromkeys([*wide.values, *map(wide.label, points)])
    rows = [
        (name, [{wide.label(point): point for point in group}.get(c) for c in columns])
        for name, group in grouped(points, rest).items()
    ]
    values = [point["metrics"].get(metric) for point in ordered(points, metric)]
    values = [value for value in values if value is not None]
    names = f"{', '.join(axis.name for axis in rest)} ↓ " if rest else ""
    return dict(
        metric=metric, header=[f"{names}{wide.name} →", *columns], rows=rows, ranked=values,
        pictures={path.stem: path for path in pictures.glob("*.png")},
    )  # fmt: skip
