"""A page as one HTML file: no script, nothing to fetch, pictures inside."""

import base64
import functools
import importlib.resources
import itertools
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jetflow.tools.report import svg
from jetflow.tools.report.content import (
    Block,
    Cell,
    Gallery,
    HeatMap,
    Lines,
    Number,
    Page,
    Prose,
    Section,
    Spot,
    Table,
    cell,
    number,
)  # fmt: skip

LONG = 40  # characters of a table's cell that is given room


def render(page: Page) -> str:
    """The file's text."""
    style = (
        importlib.resources.files("jetflow.tools.report").joinpath("page.css").read_text("utf-8")
    )
    links = [
        f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>'
        for section in page.sections
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(page.title)}</h1>",
            f'<p class="summary">{escape(page.summary)}</p>',
            f"<nav>{''.join(links)}</nav></header>",
            "<main>",
            *map(_section, page.sections),
            "</main>",
            "<footer>Made by <code>jetflow report</code>.</footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(section: Section) -> str:
    """What is small stands side by side where there is room."""
    parts = []
    for small, blocks in itertools.groupby(section.blocks, _is_small):
        inside = [_block(block) for block in blocks]
        parts += [f'<div class="plots">{"".join(inside)}</div>'] if small else inside
    name, body = _anchor(section.title), "\n".join(parts)
    if section.folded:
        heading = f"<summary>{escape(section.title)}</summary>"
        return f'<details id="{name}">{heading}\n{body}</details>'
    return f'<section id="{name}"><h2>{escape(section.title)}</h2>\n{body}</section>'


def _is_small(block: Block) -> bool:
    if isinstance(block, HeatMap):
        return not any(spot and spot.picture for row in block.spots for spot in row)
    return isinstance(block, Lines)


@functools.singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"{type(block).__name__} is no part of a page")


@_block.register
def _(prose: Prose) -> str:
    return f"<p>{escape(prose.text)}</p>"


@_block.register
def _(table: Table) -> str:
    numeric = [
        any(_is_number(row[column]) for row in table.rows) for column in range(len(table.header))
    ]
    head = "".join(
        f'<th scope="col"{_if(right, "number")}>{escape(text)}</th>'
        for text, right in zip(table.header, numeric, strict=True)
    )
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(
            f"<td{_if(right, 'number') or _if(len(text) > LONG, 'long')}>{escape(text)}</td>"
            for text, right in zip(map(cell, row), numeric, strict=True)
        )
        rows.append(f"<tr{_if(index == table.marked, 'best')}>{cells}</tr>")
    return (
        f'<figure class="wide"><div class="box"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_caption(table.caption)}</figure>"
    )


@_block.register
def _(plot: Lines) -> str:
    drawing = svg.lines(plot)
    if not drawing:
        return ""
    heading = f"<h3>{escape(plot.title)}</h3>{_legend(plot)}"
    return f"<figure>{heading}{drawing}{_caption(plot.caption)}</figure>"


@_block.register
def _(heat: HeatMap) -> str:
    values = [spot.value for row in heat.spots for spot in row if spot and spot.value is not None]
    best = (max if heat.higher_is_better else min)(values, default=None)
    ends = (min(values), max(values)) if values else (0.0, 0.0)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heat.columns)
    rows = ""
    for text, spots in zip(heat.rows, heat.spots, strict=True):
        cells = "".join(_spot(spot, ends, best) for spot in spots)
        rows += f'<tr><th scope="row">{escape(text)}</th>{cells}</tr>'
    corner = escape(f"{heat.y} ↓ {heat.x} →" if heat.y else f"{heat.x} →")
    return (
        f'<figure class="wide"><h3>{escape(heat.title)}</h3><div class="box map"><table><thead>'
        f'<tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_caption(heat.caption)}</figure>"
    )


@_block.register
def _(gallery: Gallery) -> str:
    figures = "".join(
        f'<figure><img src="{_embedded(path)}" alt="{escape(text)}" loading="lazy">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for path, text in gallery.pictures
    )
    return f'<div class="wide"><div class="gallery">{figures}</div></div>'


def _spot(spot: Spot | None, ends: tuple[Number, Number], best: Number | None) -> str:
    """A cell coloured by where its value lies between the ends."""
    if spot is None:
        return '<td class="none"></td>'
    picture = ""
    if spot.picture is not None:
        picture = f'<img src="{_embedded(spot.picture)}" alt="samples" loading="lazy">'
    note = f"<small>{escape(spot.note)}</small>" if spot.note else ""
    if spot.value is None:
        return f'<td class="none">–{note}{picture}</td>'
    low, high = ends
    colour = svg.viridis((spot.value - low) / (high - low) if high > low else 0.5)
    ink = "#000" if svg.luminance(colour) > 0.18 else "#fff"  # the better contrast of the two
    style = f"background:rgb({','.join(map(str, colour))});color:{ink}"
    mark = "★ " if spot.value == best else ""
    return (
        f'<td{_if(spot.value == best, "best")} style="{style}">{mark}{number(spot.value)}'
        f"{note}{picture}</td>"
    )


def _legend(plot: Lines) -> str:
    """The names of the lines; of many, which are coloured by their order, the ends."""
    count = len(plot.series)
    if count == 1:
        return ""
    shown: Sequence[int] = range(count) if count <= svg.NAMED_COLOURS else (0, count - 1)
    items = []
    for index in shown:
        name, style = svg.look(index, count)
        given = f'class="{name}"' + (f' style="{style}"' if style else "")
        items.append(
            f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><g {given}><path d="M0 5H28"/></g>'
            f"</svg>{escape(plot.series[index].name)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _if(condition: bool, name: str) -> str:
    return f' class="{name}"' if condition else ""


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())
