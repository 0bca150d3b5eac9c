"""`report`: the page of a folder, as one file or text."""

import base64
import csv
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from jetflow import hosts
from jetflow.files import check_writable, write_atomically
from jetflow.tools.report import plots
from jetflow.tools.report.run_page import run_page
from jetflow.tools.report.sweep_page import sweep_page
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, SWEEP

FORMATS = ("html", "md", "csv")


def report(
    folder: str | os.PathLike, format: str = "html", out: str | os.PathLike | None = None
) -> Path | str:
    """Make one page of a run or a sweep.

    Args:
        format: html, a file with all pictures inside; md, its text and tables; csv, its numbers.
        out: the file to write; by default `report.html` in the folder, and none otherwise.

    Returns:
        The file, or the text where none is written.

    Raises:
        UsageError: if the folder is neither that of a run nor of a sweep, or `format` is unknown.
    """
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    check_writable("out", None if out is None else Path(out))
    content = render(read_page(Path(folder)), format)
    if out is None and format != "html":
        return content
    path = Path(folder, "report.html") if out is None else Path(out)
    if hosts.is_first():
        with write_atomically(path) as file:
            file.write(content.encode())
    return path


def read_page(folder: Path) -> dict[str, Any]:
    """The values of the page of a run or a sweep.

    Raises:
        UsageError: if the folder is neither.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give that of a run or a sweep")
    if (folder / SWEEP).exists():
        return sweep_page(folder)
    inner = {path.parent.name for name in (CONFIG, SWEEP) for path in folder.glob(f"*/{name}")}
    if inner and not (folder / CONFIG).exists():
        names = ", ".join(sorted(inner)[:8])
        raise UsageError(f"{folder} is neither a run nor a sweep; give one that is in it: {names}")
    return run_page(folder)


def render(page: dict[str, Any], format: str = "html") -> str:
    """A page as a file's text."""
    if format == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(page["data"])
        return file.getvalue()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jetflow.tools.report"),
        autoescape=format == "html",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(text=text, picture=_picture)
    environment.tests["number"] = is_number
    environment.globals |= dict(svg=plots.svg, shade=plots.shade, columns=columns, titles=[])
    blocks = environment.get_template(f"{format}.j2").module
    body = environment.get_template(f"{page['kind']}.j2").render(page, b=blocks)
    document = environment.get_template(f"page.{format}").render(page, body=body)
    return re.sub(r"\n{3,}", "\n\n", document)


def columns(header: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None) -> str:
    """A table of Markdown in aligned columns; the best row is bold."""
    lines = [[" ".join(text(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    if best is not None:
        lines[best] = [f"**{cell}**" for cell in lines[best]]
    widths = [max(3, *map(len, column)) for column in zip(header, *lines, strict=True)]
    lines = [list(header), ["-" * width for width in widths], *lines]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A value as people write it: 3.097, 12,800, 1.2e-05, yes, (4, 4), – for None."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text, value))})"
    if not is_number(value) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _picture(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
