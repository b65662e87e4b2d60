"""Line charts as SVG: scales that one odd value does not flatten, ticks, the last value, marks."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 52, 10, 28, 24
MOST_POINTS = 400
CLIPPED = 3.0  # how many times the middle 96 % of the values the rest may span before it is cut off
HALF_LABEL = 18  # pixels of half a step's number
DECADES = 20.0  # how many times the smaller of those the larger is for a logarithmic scale
Point = tuple[float, float]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values that span [low, high], at most ``count`` steps of 1, 2 or 5."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, apart: float = 0.0) -> str:
    """A tick in few letters, of ticks that are ``apart``; 0: at any distances."""
    size = abs(value)
    if not size:
        return "0"
    if max(size, apart) >= 1e-3 and size < 1e4:
        return f"{value:.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}" if apart > 0 else f"{value:g}"
    if 1e4 <= size < 1e7:
        return f"{value / 1e3:g}k"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def log_ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic scale, about three to eight of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**k for k in decades for m in steps if low <= m * 10.0**k <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


def percentile(values: Sequence[float], part: float) -> float:
    """Of sorted ``values``."""
    return values[round(part * (len(values) - 1))]


def limits(values: list[float]) -> tuple[float, float, bool]:
    """(low, high, logarithmic) of an axis; the last value is always within."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    inner = percentile(ordered, 0.02), percentile(ordered, 0.98)
    if low > 0 and inner[1] > DECADES * inner[0]:
        return low, high, True
    if len(values) >= 20 and high - low > CLIPPED * (inner[1] - inner[0]) > 0:
        room = 0.1 * (inner[1] - inner[0])
        return min(max(low, inner[0] - room), values[-1]), max(min(high, inner[1] + room), values[-1]), False
    if high == low:
        return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2, False
    return low, high, False


def curve(title: str, xs: list[float], ys: list[float], marks: Sequence[float] = ()) -> str:
    """A line chart with its last value; values that are not finite, or far off, are left out and counted.

    marks: places on the x axis, drawn as dashed lines.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    left_out = len(xs) - len(pairs)
    if not pairs:
        name = html.escape(title) + (f" ({left_out} not finite)" if left_out else "")
        return _head(name, "") + "</svg>"
    low, high, logarithmic = limits([y for _, y in pairs])
    beyond = sum(not low <= y <= high for _, y in pairs)
    said = [f"{left_out} not finite"] * bool(left_out) + [f"{beyond} beyond"] * bool(beyond)
    said += ["log"] * logarithmic
    name = html.escape(title) + (f" ({', '.join(said)})" if said else "")
    first, last = min(x for x, _ in pairs), max(x for x, _ in pairs)

    def place(x: float, y: float) -> Point:
        across = (x - first) / ((last - first) or 1)
        values = [math.log(v) if logarithmic else v for v in (low, min(max(y, low), high), high)]
        up = (values[1] - values[0]) / (values[2] - values[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_head(name, f"{pairs[-1][1]:.4g}")]
    shown = log_ticks(low, high) if logarithmic else ticks(low, high)
    apart = 0.0 if logarithmic or len(shown) < 2 else shown[1] - shown[0]
    for value in shown:
        y = place(first, value)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(value, apart)}</text>')
    for value in ticks(first, last, 5):
        x, anchor = place(value, low)[0], "middle"
        if x > WIDTH - RIGHT - HALF_LABEL:  # else its end is cut off
            x, anchor = min(x + HALF_LABEL, WIDTH), "end"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{value:,g}</text>')
    for mark in (m for m in marks if first < m < last):
        x = place(mark, low)[0]
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    points = [place(x, y) for x, y in thinned(pairs)]
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    parts.append(f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5"/></svg>')
    return "".join(parts)


def _head(name: str, last: str) -> str:
    value = f'<text class="title" x="{WIDTH - RIGHT}" y="14" text-anchor="end">{last}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><text class="title" x="0" y="14">{name}</text>'
        f"{value if last else ''}"
    )


def thinned(pairs: list[Point]) -> list[Point]:
    """At most about MOST_POINTS, evenly chosen, the last one among them."""
    stride = max(1, math.ceil(len(pairs) / MOST_POINTS))
    return pairs[::stride] + (pairs[-1:] if (len(pairs) - 1) % stride else [])
