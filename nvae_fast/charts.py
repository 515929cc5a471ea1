"""Line and bar charts as SVG text, drawn by hand: shapes take their colours from the classes of the page around them.

Classes: `grid`, `axis` (lines), `label`, `value` (text), `series-1` and so on (lines), `dot-1` (points), `bar` (bars).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34
POINTS = 300  # of a line; longer ones are shown as means over equal stretches


class Series(NamedTuple):
    """A line through points (x, y) in order of x; a y that is None or not finite leaves a gap. `dots`: points are marked."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as an axis shows it: 12,000, 0.05, 1e-4."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        mantissa, _, power = f"{value:.3g}".partition("e") if "e" in f"{value:.3g}" else f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(power)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, from_zero: bool = False) -> str:
    """The series over one x axis and one y axis (`from_zero`: that begins at 0); a legend above them when there are several.

    The y axis ends at the largest value after the first 3 % of the steps, so that a start far above does not flatten the rest:
    lines come in from beyond it there.
    """
    shown = [s._replace(points=_thin([(x, y) for x, y in s.points if x is not None])) for s in series]
    shown = [s for s in shown if any(_is_number(y) for _, y in s.points)]
    if not shown:
        return ""
    xs = [x for s in shown for x, _ in s.points]
    x_low, x_high = min(xs), max(xs)
    ys = [(x, y) for s in shown for x, y in s.points if _is_number(y)]
    late = [y for x, y in ys if x >= x_low + 0.03 * (x_high - x_low)] or [y for _, y in ys]
    y_low, y_high = _span(min(y for _, y in ys), max(late))
    y_low = min(y_low, 0.0) if from_zero else y_low
    x_high = x_high if x_high > x_low else x_low + 1

    top = TOP + (22 if len(shown) > 1 else 0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - top)

    out = []
    for y in ticks(y_low, y_high):
        _, at = place(x_low, y)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        out.append(_text(LEFT - 7, at + 4, number(y), "label", "end"))
    for x in ticks(x_low, x_high, 6):
        at, _ = place(x, y_low)
        out.append(_text(at, HEIGHT - BOTTOM + 16, number(x), "label", "middle"))
    out.append(f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>')
    out.append(_text(WIDTH - RIGHT, HEIGHT - 3, x_label, "label", "end"))
    legend = LEFT
    for i, s in enumerate(shown, start=1):
        for run in _runs(_cut(s.points, y_high)):
            corners = [place(x, y) for x, y in run]
            if len(corners) > 1:
                out.append(f'<polyline class="series-{i}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>')
            for (x, y), (px, py) in zip(run, corners, strict=True):
                if s.dots or len(run) == 1:
                    said = escape(f"{s.name}: {y:.6g} at {x_label} {x:g}")
                    out.append(f'<circle class="dot-{i}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{said}</title></circle>')
        if len(shown) > 1:
            out.append(f'<line class="series-{i}" x1="{legend}" y1="{TOP}" x2="{legend + 16}" y2="{TOP}"/>')
            out.append(_text(legend + 22, TOP + 4, s.name, "label", "start"))
            legend += 46 + 7 * len(s.name)
    return _svg(out, HEIGHT, f"{y_label} by {x_label}: " + ", ".join(s.name for s in shown))


def bar_chart(rows: Sequence[tuple[str, float, str]], title: str) -> str:
    """Horizontal bars from 0: (label, value, text behind the bar) by row."""
    rows = [(label, value, said) for label, value, said in rows if _is_number(value)]
    if not rows:
        return ""
    pitch, left = 24, 26 + 7 * max(len(label) for label, _, _ in rows)
    room = WIDTH - left - RIGHT - 16 - 7 * max(len(said) for _, _, said in rows)
    largest = max(max(value for _, value, _ in rows), 1e-12)
    out = [f'<line class="axis" x1="{left}" y1="4" x2="{left}" y2="{len(rows) * pitch + 4}"/>']
    for i, (label, value, said) in enumerate(rows):
        y, length = 4 + i * pitch, max(value, 0) / largest * room
        out.append(_text(left - 8, y + 16, label, "label", "end"))
        out.append(f'<rect class="bar" x="{left}" y="{y + 4}" width="{max(length, 0.5):.1f}" height="{pitch - 8}" rx="2"/>')
        out.append(_text(left + length + 8, y + 16, said, "value", "start"))
    return _svg(out, len(rows) * pitch + 8, title)


def _svg(parts: Sequence[str], height: int, said: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(said)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _is_number(y: object) -> bool:
    return isinstance(y, (int, float)) and math.isfinite(y)


def _span(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _cut(points: Sequence[tuple[float, float | None]], top: float) -> list[tuple[float, float | None]]:
    """The points up to `top`, with gaps instead of those above it and a point where a line crosses it."""
    out: list[tuple[float, float | None]] = []
    last: tuple[float, float | None] = (0.0, None)
    for x, y in points:
        if _is_number(y) and _is_number(last[1]) and (y > top) != (last[1] > top):
            out.append((last[0] + (top - last[1]) / (y - last[1]) * (x - last[0]), top))
        out.append((x, None) if _is_number(y) and y > top else (x, y))
        last = (x, y)
    return out


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The stretches between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if _is_number(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    if len(points) <= POINTS:
        return list(points)
    out: list[tuple[float, float | None]] = []
    for i in range(POINTS):
        part = points[i * len(points) // POINTS : (i + 1) * len(points) // POINTS]
        ys = [y for _, y in part if _is_number(y)]
        out.append((sum(x for x, _ in part) / len(part), sum(ys) / len(ys) if ys else None))
    return out
