"""Histograms as inline SVG; labels are text, so that the browser's fonts show them, Chinese or not."""

import math
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 24  # margins
LOG_SPAN = 1000  # edges that reach this many times further than the first are drawn on a log axis
COLOURS = ("series0", "series1")  # classes of the page's style


def plot(name: str, histogram: dict[str, Any]) -> Markup | None:
    """A figure of all series of a histogram (edges, series -> counts); None where nothing was counted.

    A histogram of one series over a log axis, such as sizes of clusters, has a log axis for its counts as well.
    """
    edges, series = histogram["edges"], histogram["series"]
    used = [i for counts in series.values() for i, count in enumerate(counts) if count]
    if not used:
        return None
    edges = edges[min(used) : max(used) + 2]
    series = {label: counts[min(used) : max(used) + 1] for label, counts in series.items()}
    is_log = histogram["edges"][-1] >= LOG_SPAN
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT, is_log)
    most = max(max(counts) for counts in series.values())
    y = Axis(0, most, HEIGHT - BOTTOM, TOP, is_log and len(series) == 1)
    shapes = [
        Markup('<path class="{}" d="{}"/>').format(COLOURS[n % len(COLOURS)], outline(edges, counts, x, y))
        for n, counts in enumerate(series.values())
    ]
    legend = [Markup('<i class="{}"></i>{} ').format(COLOURS[n % 2], s) for n, s in enumerate(series) if s]
    return Markup(
        '<figure><figcaption>{} <span class="legend">{}</span></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg></figure>'
    ).format(
        name,
        Markup("").join(legend),
        WIDTH,
        HEIGHT,
        name,
        ticks(x, y, is_share=edges[-1] <= 1),
        Markup("").join(shapes),
    )


class Axis:
    """Values onto pixels. A log axis begins at half of the smallest positive integer, so that 0 has a place."""

    def __init__(self, low: float, high: float, start: float, end: float, is_log: bool) -> None:
        self.is_log, self.start, self.end = is_log, start, end
        self.low, self.high = self._scale(low), self._scale(high)

    def _scale(self, value: float) -> float:
        return math.log10(max(value, 0.5)) if self.is_log else value

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low or 1)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """A few round values on the axis."""
        if self.is_log:
            steps = (1,) if self.high - self.low > 2 else (1, 2, 5)
            values = [n * 10**power for power in range(12) for n in steps]
            return [n for n in values if self.low - 1e-9 <= math.log10(n) <= self.high + 1e-9]
        rough = (self.high - self.low) / 4 or 1
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def outline(edges: list[float], counts: list[int], x: Axis, y: Axis) -> str:
    """The path around the bars."""
    ground = y.start
    steps = "".join(
        f"V{y(count) if count else ground}H{x(right)}" for count, right in zip(counts, edges[1:], strict=True)
    )
    return f"M{x(edges[0])} {ground}{steps}V{ground}Z"


def ticks(x: Axis, y: Axis, is_share: bool) -> Markup:
    """Grid lines and labels of both axes."""
    marks = []
    for value in x.ticks():
        label = f"{value:.0%}" if is_share else short(value)
        marks.append(
            Markup('<text class="x" x="{}" y="{}">{}</text>').format(x(value), HEIGHT - BOTTOM + 15, label)
        )
    for value in y.ticks():
        line = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, y(value), y(value)
        )
        label = Markup('<text class="y" x="{}" y="{}">{}</text>').format(LEFT - 5, y(value) + 4, short(value))
        marks += [line, label]
    return Markup("").join(marks)


def short(value: float) -> str:
    """A round number in few characters: 20, 500, 2千, 10万, 1亿."""
    for unit, name in ((10**8, "亿"), (10**4, "万"), (10**3, "千")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
