"""What a sweep has found, by point and metric."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jetflow.tools.report.axes import axes
from jetflow.tools.report.content import Cell, Number, Spot, Table, number

HIGHER_IS_BETTER = {"accuracy", "sample_accuracy", "precision", "recall", "density", "coverage"}


class Found:
    """The records of a sweep.

    Attributes:
        points: of each, setting → {"value", "label"}.
        axes: of the grid.
        metrics: in the order in which the sweep asks for them.
    """

    def __init__(self, path: Path, points: list[dict[str, Any]], records: list[dict[str, Any]]):
        self.points = points
        self.axes = axes(points)
        self._path = path
        self._records = {record["number"]: record for record in records}
        measured = [record.get("metrics", {}) for record in records]
        self.metrics = list(dict.fromkeys(name for metrics in measured for name in metrics))

    @property
    def varying(self) -> list[str]:
        """The metrics that are not the same at all points; all of them where none varies."""
        everywhere = range(len(self.points))
        values = {name: {self.value(i, name) for i in everywhere} - {None} for name in self.metrics}
        return [name for name in self.metrics if len(values[name]) > 1] or self.metrics

    def value(self, index: int, metric: str) -> Number | None:
        """Of a point; None where it has none, or none that is finite."""
        return self._records.get(index, {}).get("metrics", {}).get(metric)

    def spot(self, index: int, metric: str) -> Spot:
        """A point's value with its samples."""
        record = self._records.get(index, {"status": "not measured yet"})
        picture = self._path / "points" / f"{record.get('name')}.png"
        value = self.value(index, metric)
        note = record["status"] if value is None else ""
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

    def winner(self, what: str = "best") -> str:
        """ "; the best fid is 3.2, at guidance 1"; empty before there is one."""
        main = self.metrics[0] if self.metrics else ""
        best = self.best(range(len(self.points)), main)
        if best is None:
            return ""
        value = number(self.value(best, main) or 0.0)
        where = ", ".join(f"{axis.name} {axis.label(self.points[best])}" for axis in self.axes)
        equal = [self.value(i, main) for i in range(len(self.points))].count(self.value(best, main))
        if equal > 1:
            where = f"{equal} points, the first {where}"
        return f"; the {what} {main} is {value}, at {where}" if self.axes else ""

    def table(self) -> Table:
        """The points, best first by the first metric; those without a value last."""
        main = self.metrics[0] if self.metrics else ""
        order = self.order(range(len(self.points)), main)
        facts = [name for name in ("parameters", "step") if self._differs(name)]
        header = ["point", *self._headings(), *(axis.name for axis in self.axes)]
        header += [*facts, "status"]
        rows: list[list[Cell]] = []
        for i in order:
            row: list[Cell] = [str(i)]
            row += [cell for metric in self.metrics for cell in self._cells(i, metric)]
            row += [axis.label(self.points[i]) for axis in self.axes]
            rows.append([*row, *(self._fact(i, name) for name in facts), self._status(i)])
        ordered = f"Sorted by {main}, {direction(main)}; the best row is marked." if main else ""
        marked = 0 if main and self.value(order[0], main) is not None else None
        return Table(header, rows, ordered, marked)

    def data(self) -> Table:
        """Every setting and metric of every point, in the order of the sweep."""
        names = list(dict.fromkeys(name for point in self.points for name in point))
        errors = [f"{metric}_standard_error" for metric in self.metrics]
        facts = [name for name in ("parameters", "step", "status", "error") if name not in names]
        header = ["point", *names, *self.metrics, *errors, *facts]
        rows: list[list[Cell]] = []
        for i, point in enumerate(self.points):
            record = self._records.get(i, {})
            row: list[Cell] = [
                i,
                *(point[name]["label"] if name in point else None for name in names),
            ]
            row += [self.value(i, metric) for metric in self.metrics]
            row += [record.get("errors", {}).get(metric) for metric in self.metrics]
            known = {**record, "status": self._status(i)}
            rows.append([*row, *(known.get(name) for name in facts)])
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

    def _fact(self, index: int, name: str) -> Cell:
        return self._records.get(index, {}).get(name)

    def _differs(self, name: str) -> bool:
        """Whether points differ in a fact that no axis shows."""
        shown = any(name in axis.settings for axis in self.axes)
        known = {self._fact(i, name) for i in range(len(self.points))} - {None}
        return len(known) > 1 and not shown

    def _status(self, index: int) -> str:
        return self._records.get(index, {"status": "not measured yet"})["status"]


def is_better_higher(metric: str) -> bool:
    return metric in HIGHER_IS_BETTER


def direction(metric: str) -> str:
    return "higher is better" if is_better_higher(metric) else "lower is better"
