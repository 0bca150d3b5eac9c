"""The parts of a page, before they are set in any format."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

Number: TypeAlias = int | float
Cell: TypeAlias = str | Number | bool | None


@dataclasses.dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header.

    Attributes:
        marked: the row that is the best, if there is one.
        caption: what one sees.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    marked: int | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a plot: (x, y) by rising x."""

    name: str
    points: Sequence[tuple[Number, Number]]


@dataclasses.dataclass(frozen=True)
class Lines:
    """A plot of lines.

    Attributes:
        x, y: what the axes are, with units.
        log_x, log_y: logarithmic axes, for values above 0.
        caption: what one sees.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclasses.dataclass(frozen=True)
class Spot:
    """A cell of a heat map: a value, or why there is none, and samples."""

    value: Number | None
    note: str = ""
    picture: Path | None = None


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Values over two axes.

    Attributes:
        x, y: the names of the axes; columns, rows: their values.
        spots: by row and column; None where there is no point.
        higher_is_better: the best is marked.
    """

    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    spots: Sequence[Sequence[Spot | None]]
    higher_is_better: bool
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures side by side, each with its caption."""

    pictures: Sequence[tuple[Path, str]]


Block: TypeAlias = Prose | Table | Lines | HeatMap | Gallery


@dataclasses.dataclass(frozen=True)
class Section:
    """Blocks under a heading; a folded one shows them when asked to."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """What is told of a run or a sweep.

    Attributes:
        title, summary: the first lines.
        data: what a spreadsheet wants of it: all numbers, unrounded.
        table: the result in short; of a sweep.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    data: Table
    table: Table | None = None


def number(value: Number, digits: int = 4) -> str:
    """A number as people write it: 3.097, 12,800, 1.2e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def cell(value: Cell) -> str:
    """A table's cell as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else value
