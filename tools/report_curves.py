"""Curves of a training as inline SVG: axes, paths with gaps, a legend; no script, no file.

Colours and fonts are those of the page's style sheet (classes c0, c1, ...), so that a dark scheme
and print hold for curves too. Points are (x, y); y is None where a value was undefined.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any

from tools.report_runs import number

WIDTH = 640  # units of the drawing, which scales to the page
HEIGHT = 240
LEFT = 58  # room for the labels of the y axis
RIGHT = 14
TOP = 12
BOTTOM = 34  # room for those of the x axis
MOST_POINTS = 600  # of a curve: about one a unit of the drawing
FEW_POINTS = 40  # up to here each point has a dot
# No training writes beyond these, but a damaged log may, and axes must not overflow.
HUGE = 1e100
TINY = 1e-100
MOST_EPOCHS = 1e9
Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Series:
    """One curve of a chart."""

    label: str
    points: Points


@dataclass(frozen=True)
class Frame:
    """The range of values that the axes span."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value lies in the drawing; its y axis points down."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        from_left = LEFT + across * (WIDTH - LEFT - RIGHT)
        from_top = HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return from_left, from_top


# What is drawn of a log: a chart's title, its curves by their name in the log, and whether the
# chart has a line at 0.
CHARTS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("self-distillation loss", {"loss": "loss"}, False),
    ("KoLeo term", {"koleo": "KoLeo"}, False),
    ("patch term", {"patch": "patch"}, False),
    ("lesion term", {"lesion": "lesion"}, False),
    ("learning rate", {"lr": "learning rate"}, False),
    (
        "k-NN on validation: accuracy",
        {"knn_accuracy": "accuracy", "knn_majority": "always the most frequent grade"},
        False,
    ),
    ("k-NN on validation: QWK", {"knn_qwk": "QWK"}, True),
    ("RankMe: effective rank of the embeddings", {"rankme": "RankMe"}, False),
    ("standard deviation of the embeddings", {"embedding_std": "standard deviation"}, False),
    (
        "entropy, as a share of the uniform distribution's",
        {"teacher_entropy": "of the teacher", "marginal_entropy": "of its mean output"},
        False,
    ),
)


def charts(log: list[dict[str, Any]]) -> list[str]:
    """Return the charts of what a log holds, each an html figure."""
    figures = []
    for title, curves, has_zero in CHARTS:
        drawn = []
        for name, label in curves.items():
            points = read_points(log, name)
            if points:
                drawn.append(Series(label, points))
        if drawn:
            figures.append(chart(title, drawn, has_zero=has_zero))
    return figures


def read_points(log: list[dict[str, Any]], name: str) -> Points:
    """Return (epoch, value) of the records that measured `name`; the value is None if undefined."""
    points: Points = []
    for record in log:
        epoch = number(record.get("epoch"))
        if name not in record or epoch is None or abs(epoch) > MOST_EPOCHS:
            continue
        value = number(record[name])
        if value is not None and abs(value) > HUGE:
            value = None
        points.append((epoch, value))
    return points


def chart(title: str, series: list[Series], *, has_zero: bool = False) -> str:
    """Return curves in one frame as an html figure, with the last value of each in its caption."""
    known = []
    for one in series:
        known += [(x, y) for x, y in one.points if y is not None]
    caption = f"<figcaption><strong>{html.escape(title)}</strong>{_legend(series)}</figcaption>"
    if not known:
        return f"<figure>{caption}<p>No value was defined.</p></figure>"

    frame = fit_frame(known, has_zero=has_zero)
    parts = [_axes(frame)]
    if has_zero:
        left = frame.place(frame.x_low, 0)
        right = frame.place(frame.x_high, 0)
        parts.append(f'<path class="zero" d="M{_pair(left)}L{_pair(right)}"/>')
    for place, one in enumerate(series):
        points = thin(one.points, MOST_POINTS)
        parts.append(f'<path class="curve c{place}" d="{path(points, frame)}"/>')
        for x, y in dotted(points):
            across, down = frame.place(x, y)
            parts.append(f'<circle class="dot c{place}" cx="{across:.1f}" cy="{down:.1f}" r="3"/>')
    label = html.escape(f"{title}, by epoch")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return f"<figure>{caption}{drawing}<title>{label}</title>{''.join(parts)}</svg></figure>"


def _legend(series: list[Series]) -> str:
    """Return each curve's mark, name and last value; the text says all that colours say."""
    entries = []
    for place, one in enumerate(series):
        x, y = one.points[-1]
        shown = "undefined"
        if y is not None:
            shown = f"{y:.4g}"
        mark = f'<span class="mark m{place}" aria-hidden="true"></span>'
        entries.append(f"{mark}{html.escape(one.label)}: {shown} at epoch {x:.4g}")
    return "".join(f'<span class="key">{entry}</span>' for entry in entries)


def fit_frame(points: list[tuple[float, float]], *, has_zero: bool = False) -> Frame:
    """Return the frame that holds the points, with some air above and below."""
    across = [x for x, _ in points]
    up = [y for _, y in points]
    if has_zero:
        up.append(0.0)
    x_low = min(across)
    x_high = max(across)
    if x_low == x_high:
        x_low -= 0.5
        x_high += 0.5
    y_low = min(up)
    y_high = max(up)
    air = 0.05 * (y_high - y_low)
    # Values that differ by rounding alone would fill the height with noise.
    largest = max(abs(y_low), abs(y_high))
    if largest < TINY:
        air = 1.0
    elif y_high - y_low < 1e-3 * largest:
        air = 1e-3 * largest
    return Frame(x_low, x_high, y_low - air, y_high + air)


def path(points: Points, frame: Frame) -> str:
    """Return the d attribute of a curve: a line that stops before an undefined point."""
    steps = []
    pen = "M"  # moves without drawing
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        steps.append(pen + _pair(frame.place(x, y)))
        pen = "L"
    return "".join(steps)


def _pair(place: tuple[float, float]) -> str:
    return f"{place[0]:.1f} {place[1]:.1f}"


def dotted(points: Points) -> list[tuple[float, float]]:
    """Return the points that get a dot: all of a few, else those that no line reaches."""
    found = []
    for place, (x, y) in enumerate(points):
        if y is None:
            continue
        before = place > 0 and points[place - 1][1] is not None
        after = place + 1 < len(points) and points[place + 1][1] is not None
        if len(points) <= FEW_POINTS or not (before or after):
            found.append((x, y))
    return found


def thin(points: Points, most: int) -> Points:
    """Return at most about `most` points: of each stretch the lowest and the highest, in order.

    So peaks stay. A stretch with an undefined point keeps one, so that gaps stay too.
    """
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: Points = []
    for first in range(0, len(points), size):
        stretch = range(first, min(first + size, len(points)))
        defined = [place for place in stretch if points[place][1] is not None]
        chosen = {place for place in stretch if points[place][1] is None}
        chosen = set(sorted(chosen)[:1])
        if defined:
            chosen.add(min(defined, key=lambda place: points[place][1]))
            chosen.add(max(defined, key=lambda place: points[place][1]))
        kept += [points[place] for place in sorted(chosen)]
    # The caption tells the last value, so the curve must end there.
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high], at most `most` + 1, in steps of 1, 2 or 5."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = 10 * power
    for factor in (1, 2, 5):
        if factor * power >= rough * (1 - 1e-9):
            step = factor * power
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def _axes(frame: Frame) -> str:
    """Return grid lines with their labels, and the name of the x axis."""
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        left = frame.place(frame.x_low, value)
        right = frame.place(frame.x_high, value)
        parts.append(f'<path class="grid" d="M{_pair(left)}L{_pair(right)}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{left[1] + 4:.1f}" text-anchor="end">{value:.5g}</text>'
        )
    for value in ticks(frame.x_low, frame.x_high, 8):
        across, down = frame.place(value, frame.y_low)
        parts.append(f'<path class="grid" d="M{across:.1f} {down:.1f}v4"/>')
        parts.append(
            f'<text x="{across:.1f}" y="{down + 17:.1f}" text-anchor="middle">{value:.5g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text>')
    return "".join(parts)
