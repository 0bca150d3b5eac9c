"""A page as Markdown, without its pictures, and its numbers as CSV."""

import csv
import io
from collections.abc import Iterator

from jetflow.tools.report.content import HeatMap, Page, Prose, Spot, Table, cell, number


def markdown(page: Page) -> str:
    """Headings, paragraphs and tables; heat maps as tables. Plots and pictures are left out."""
    parts = [f"# {page.title}", page.summary]
    for section in page.sections:
        blocks = [
            text
            for block in section.blocks
            if isinstance(block, Prose | Table | HeatMap)
            for text in _block(block)
        ]
        parts += [f"## {section.title}", *blocks] if blocks else []
    return "\n\n".join(parts) + "\n"


def comma_separated(page: Page) -> str:
    """The data of a page, unrounded, a line a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(page.data.header)
    writer.writerows(page.data.rows)
    return text.getvalue()


def plain(table: Table) -> str:
    """A table for a terminal; * is the best."""
    rows = [list(table.header), *(list(map(cell, row)) for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    best = None if table.marked is None else table.marked + 1
    return "\n".join(
        ("* " if index == best else "  ")
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for index, row in enumerate(rows)
    )


def _block(block: Prose | Table | HeatMap) -> Iterator[str]:
    if isinstance(block, Prose):
        yield block.text
        return
    if isinstance(block, HeatMap):
        yield f"### {block.title}"
        rows = [
            [name, *map(_spot, spots)]
            for name, spots in zip(block.rows, block.spots, strict=True)
        ]  # fmt: skip
        yield _table([f"{block.y} ↓ {block.x} →", *block.columns], rows)
    else:
        yield _table(block.header, [_row(block, index) for index in range(len(block.rows))])
    if block.caption:
        yield block.caption


def _row(table: Table, index: int) -> list[str]:
    cells = [cell(value) for value in table.rows[index]]
    return [f"**{text}**" for text in cells] if index == table.marked else cells


def _spot(spot: Spot | None) -> str:
    return "" if spot is None else "–" if spot.value is None else number(spot.value)


def _table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in line) + " |"
        for line in lines
    )
