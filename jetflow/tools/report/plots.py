"""Plots and shades of a page, by matplotlib: SVG that takes the page's colour for its text."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Point: TypeAlias = tuple[int | float, int | float]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0568c", "#a37200", "#3a8fc7")  # on white and dark
DASHES = ("-", "--", ":", "-.", (0, (4, 2)), (0, (8, 3)))
INK = "#010203"  # stands for the colour of the page's text
MARKED = 16  # points; a longer line has no markers
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#80808050",
    "legend.frameon": False,
    "axes.formatter.limits": (-3, 5),
    **dict.fromkeys(INKED, INK),
}


def svg(name: str, x: str, y: str, lines: Mapping[str, Sequence[Point]], log: bool = False) -> str:
    """An <svg> element with lines over x, by their names.

    Args:
        name: that no other plot of the page has; ids within the SVG are made from it.
        log: a logarithmic y axis.
    """
    import matplotlib  # takes half a second; pages without plots need none
    from matplotlib.figure import Figure

    count = len(lines)
    many = count > len(COLOURS)  # then the shades of a scale, and only its ends in the legend
    style: Any = STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.1), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        for index, (label, line) in enumerate(lines.items()):
            scale = matplotlib.colormaps["viridis"](0.1 + 0.75 * index / count)
            axes.plot(
                *zip(*line, strict=True),
                label=label if not many or index in (0, count - 1) else None,
                color=scale if many else COLOURS[index],
                linestyle="-" if many else DASHES[index],
                marker="o" if len(line) <= MARKED else None,
                markersize=4,
                linewidth=1 if many else 1.6,
            )
        if count > 1:
            figure.legend(
                loc="outside upper left", ncols=max(1, min(3, 50 // max(map(len, lines))))
            )
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'<g id="[^"]*"', "<g", drawing)  # equal in all plots, and used by none


def shade(value: int | float, low: int | float, high: int | float) -> str:
    """The style of a cell of a map: viridis, and black or white ink, whichever contrasts more."""
    from matplotlib import colormaps

    colour = colormaps["viridis"]((value - low) / (high - low) if high > low else 0.5)[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    red, green, blue = (round(255 * c) for c in colour)
    ink = "#000" if luminance > 0.18 else "#fff"
    return f"background:rgb({red},{green},{blue});color:{ink}"
