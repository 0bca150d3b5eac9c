"""`report`: the page of a folder, as one file or text."""

import base64
import csv
import io
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from jetflow import hosts
from jetflow.buckets import AnyPath, as_path
from jetflow.files import check_writable, write_atomically
from jetflow.tools.report import plots
from jetflow.tools.report.run_page import run_page
from jetflow.tools.report.sweep_page import sweep_page
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, SWEEP

FORMATS = ("html", "md", "csv")

# What Markdown would take for its own: not a _ within a word, and not a - or # but at the start.
MARKDOWN = re.compile(r"[\\`*<>\[\]|&~]|\b_|_\b|^[-+#=](?![\d.])")


def report(
    folder: str | os.PathLike, format: str = "html", out: str | os.PathLike | None = None
) -> AnyPath | str:
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
    page = read_page(as_path(folder))
    if out is None and format != "html":
        return render(page, format)
    path = as_path(folder) / "report.html" if out is None else as_path(out)
    check_writable("out", path)
    content = render(page, format)
    if hosts.is_first():
        with write_atomically(path) as file:
            file.write(content.encode())
    return path


def read_page(folder: AnyPath) -> dict[str, Any]:
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
        autoescape=True,
        finalize=escaped if format == "md" else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(text=text, picture=_picture)
    environment.tests["number"] = is_number
    environment.globals |= dict(svg=plots.svg, shade=plots.shade, columns=columns, titles=[])
    blocks = environment.get_template(f"{format}.j2").module
    body = Markup(environment.get_template(f"{page['kind']}.j2").render(page, b=blocks))
    document = environment.get_template(f"page.{format}").render(page, body=body)
    return re.sub(r"\n{3,}", "\n\n", document)


def escaped(value: Any) -> Markup:
    """A value as Markdown that shows it as it is, in one line."""
    if isinstance(value, Markup):
        return value
    return Markup(re.sub(r"\s*[\r\n]\s*", " ", MARKDOWN.sub(r"\\\g<0>", str(value))))


def columns(
    header: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None
) -> Markup:
    """A table of Markdown in aligned columns; the best row is bold."""
    lines = [[escaped(text(cell)) for cell in row] for row in (header, *rows)]
    if best is not None:
        lines[best + 1] = [Markup(f"**{cell}**") for cell in lines[best + 1]]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, [Markup("-" * width) for width in widths])
    padded = [map(str.ljust, line, widths) for line in lines]
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in padded))


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
        return value if isinstance(value, Markup) else str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _picture(path: AnyPath) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
