"""Plots as SVG, drawn by hand: they take the page's colours, light or dark, and scale with it."""

import math
from collections.abc import Sequence
from html import escape

from jetflow.tools.report.content import Lines, Number, Series, number

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 408, 30, 228  # of the frame of the data
NAMED_COLOURS = 6  # that page.css tells apart; more series than that are coloured by their order
MARKED = 16  # points; a longer line shows none of them
TICKS = 6  # at most

# Viridis at seven places, blue to yellow; between them it is close to linear.
VIRIDIS = (
    (68, 1, 84), (68, 57, 131), (49, 104, 142), (33, 145, 140), (53, 183, 121), (144, 215, 67),
    (253, 231, 37),
)  # fmt: skip


def lines(plot: Lines) -> str:
    """A plot as an <svg> element; "" without points.

    Values that are not finite, or not above 0 on a logarithmic axis, are left out.
    """
    series = [
        Series(one.name, [point for point in one.points if _shown(plot, point)])
        for one in plot.series
    ]
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    x_axis = _Axis([x for x, _ in points], LEFT, RIGHT, plot.log_x, padded=False)
    y_axis = _Axis([y for _, y in points], BOTTOM, TOP, plot.log_y, padded=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}: '
        f'{escape(plot.y)} over {escape(plot.x)}">',
        *(_y_tick(y_axis.place(value), text) for value, text in y_axis.ticks),
        *(_x_tick(x_axis.place(value), text) for value, text in x_axis.ticks),
        f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>',
    ]
    for index, one in enumerate(series):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in one.points]
        parts += _line(one, places, *look(index, len(series)))
    parts += [
        f'<text class="xlabel" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}">{escape(plot.x)}</text>',
        f'<text x="4" y="14">{escape(plot.y)}</text>',
        "</svg>",
    ]
    return "".join(parts)


def look(index: int, count: int) -> tuple[str, str]:
    """Class and style of a series' line: a colour of its own with its dashes, or one of a scale."""
    if count <= NAMED_COLOURS:
        return f"s{index}", ""
    red, green, blue = viridis(0.1 + 0.75 * index / (count - 1))
    return "many", f"stroke:rgb({red},{green},{blue});fill:rgb({red},{green},{blue})"


def viridis(share: Number) -> tuple[int, int, int]:
    """The colour at 0 ≤ share ≤ 1 of a scale that is even to the eye, also without colour."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - low))
        for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True)
    )
    return red, green, blue


def luminance(colour: tuple[int, int, int]) -> Number:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (part / 255 for part in colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _line(one: Series, places: Sequence[tuple[Number, Number]], name: str, style: str) -> list[str]:
    given = f'class="{name}"' + (f' style="{style}"' if style else "")
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<g {given}><path d="{path}"/>'] if places else [f"<g {given}>"]
    if len(places) <= MARKED:
        for (x, y), (at, value) in zip(places, one.points, strict=True):
            text = escape(f"{one.name}, {number(at)}: {number(value)}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{text}</title></circle>')
    return [*parts, "</g>"]


def _shown(plot: Lines, point: tuple[Number, Number]) -> bool:
    x, y = point
    positive = (x > 0 or not plot.log_x) and (y > 0 or not plot.log_y)
    return positive and math.isfinite(x) and math.isfinite(y)


def _x_tick(x: Number, text: str) -> str:
    return (
        f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>'
        f'<text class="xtick" x="{x:.1f}" y="{BOTTOM + 16}">{text}</text>'
    )


def _y_tick(y: Number, text: str) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        f'<text class="ytick" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>'
    )


class _Axis:
    """From values to places in the picture, `start` to `end`, with ticks at round numbers."""

    def __init__(self, values: list[Number], start: Number, end: Number, log: bool, padded: bool):
        self._log, self._start, self._end = log, start, end
        low, high = self._scaled(min(values)), self._scaled(max(values))
        if low == high:
            low, high = low - 0.5, high + 0.5
        margin = 0.05 * (high - low) if padded else 0.0
        self._low, self._high = low - margin, high + margin
        few = _log_ticks(self._low, self._high) if log else []
        self.ticks = few or _linear_ticks(*self._ends())

    def place(self, value: Number) -> Number:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def _scaled(self, value: Number) -> Number:
        return math.log10(value) if self._log else value

    def _ends(self) -> tuple[Number, Number]:
        return (10**self._low, 10**self._high) if self._log else (self._low, self._high)


def _linear_ticks(low: Number, high: Number) -> list[tuple[Number, str]]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(i * step, _short(i * step, decimals)) for i in range(first, last + 1)]


def _log_ticks(low: Number, high: Number) -> list[tuple[Number, str]]:
    """Powers of ten with, where these are few, twice and five times them; [] if still too few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 2, 5)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        values = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
        if len(values) >= 3:
            stride = math.ceil(len(values) / (TICKS + 1))
            return [(value, _short(value, max(0, -math.floor(math.log10(value) + 1e-9))))
                    for value in values[::stride]]  # fmt: skip
    return []


def _short(value: Number, decimals: int) -> str:
    """The number at a tick, at most about six characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and value % (size / 10) == 0:
            return f"{value / size:g}{unit}"
    return f"{value:.2g}" if decimals > 4 and abs(value) < 0.01 else f"{value:.{decimals}f}"
