"""The axes of a sweep, as its points show them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jetflow.sweeps import short_names
from jetflow.tools.report.content import Number

LACKING = "–"  # where a point does not have a setting


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is swept: a setting, or several that change together.

    Attributes:
        settings: their full names.
        name: for people.
        labels: of its values, in the order of the sweep; points of a chain may have none of them.
        numbers: the values, where all are numbers; else none.
    """

    settings: tuple[str, ...]
    name: str
    labels: tuple[str, ...]
    numbers: tuple[Number, ...]

    def place(self, point: dict[str, Any]) -> int:
        """Which of its values a point has; -1 where the point lacks the setting."""
        label = _label(point, self.settings)
        return self.labels.index(label) if label in self.labels else -1

    def label(self, point: dict[str, Any]) -> str:
        """Which value a point has, for people."""
        place = self.place(point)
        return self.labels[place] if place >= 0 else LACKING


def axes(points: Sequence[dict[str, Any]]) -> list[Axis]:
    """The axes of a grid: settings that not all points share; those that name each other are one.

    Args:
        points: of each, setting → {"value", "label"}.
    """
    names = list(dict.fromkeys(name for point in points for name in point))
    swept = [name for name in names if len({_label(point, (name,)) for point in points}) > 1]
    groups: list[tuple[str, ...]] = []
    for name in swept:
        for index, group in enumerate(groups):
            if _together(points, group[0], name):
                groups[index] = (*group, name)
                break
        else:
            groups.append((name,))
    called = short_names(names)
    return [_axis(points, group, ", ".join(map(called.__getitem__, group))) for group in groups]


def _axis(points: Sequence[dict[str, Any]], settings: tuple[str, ...], name: str) -> Axis:
    having = [point for point in points if settings[0] in point]
    values = {_label(point, settings): point[settings[0]]["value"] for point in having}
    numbers = tuple(value for value in values.values() if _is_number(value))
    return Axis(
        settings,
        name,
        tuple(values),
        numbers if len(numbers) == len(values) else (),
    )


def _together(points: Sequence[dict[str, Any]], one: str, other: str) -> bool:
    """Whether each value of the one setting comes with one value of the other, and back."""
    if any((one in point) != (other in point) for point in points):
        return False
    pairs = {(_label(point, (one,)), _label(point, (other,))) for point in points}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _label(point: dict[str, Any], settings: tuple[str, ...]) -> str:
    return ", ".join(point[name]["label"] if name in point else LACKING for name in settings)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
