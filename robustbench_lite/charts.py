"""Small line charts as the geometry of an inline SVG: what is where, in user units; the page draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 38, 332, 8, 172
LOOKS, MARKERS, DASHES = 7, 6, 4  # colours, marks and dashes that the page has: 84 lines are told apart


@dataclass(frozen=True)
class Point:
    """Of a curve; ``y`` and its interval are fractions, unless the chart says how high it is."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A curve as drawn."""

    label: str
    number: int  # among those that share a legend
    path: str
    band: str
    dots: list[tuple[str, str]]

    @property
    def look(self) -> str:
        """The classes that colour and dash it."""
        return f"c{self.number % LOOKS} d{self.number % DASHES}"

    @property
    def marker(self) -> str:
        return f"m{self.number % MARKERS}"


@dataclass(frozen=True)
class Chart:
    """A panel: fractions as percent, or figures from 0 up to ``height``, over eps, over ``whole`` numbers or, where
    ``log``, over counts, at which they step."""

    across: str  # what runs along the x axis
    up: str
    top: float
    log: bool = False
    whole: bool = False
    height: float | None = None
    lines: list[Line] = field(default_factory=list)

    def add(self, label: str, points: Sequence[Point]) -> None:
        """One more curve."""
        at = [(f"{self.x(point.x):.1f}", f"{self.y(point.y):.1f}") for point in points]
        low = [f"{self.x(p.x):.1f},{self.y(p.low):.1f}" for p in points if p.low is not None]
        high = [f"{self.x(p.x):.1f},{self.y(p.high):.1f}" for p in points if p.high is not None]
        path = "M{},{}".format(*at[0]) + "".join(f"H{x}V{y}" if self.log else f"L{x},{y}" for x, y in at[1:])
        band = "M" + "L".join([*low, *reversed(high)]) + "Z" if low else ""
        every = max(1, len(at) // 8)
        self.lines.append(Line(label, len(self.lines), path, band, at[::every]))

    def x(self, value: float) -> float:
        share = math.log(value) / math.log(max(self.top, 2)) if self.log else value / self.top
        return LEFT + (RIGHT - LEFT) * share

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / (self.height or 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels along the x axis."""
        if self.log:
            decades = math.floor(math.log10(max(self.top, 2)) + 1e-9)
            every = max(1, math.ceil((decades + 1) / 5))
            return [(self.x(10.0**k), f"{10**k:,}") for k in range(0, decades + 1, every)]
        return [(self.x(value), f"{value:g}") for value in _round(self.top, self.whole)]

    @property
    def levels(self) -> list[tuple[float, str]]:
        """Places and labels along the y axis."""
        if self.height is not None:
            return [(self.y(value), f"{value:g}") for value in _round(self.height)]
        return [(self.y(percent / 100), str(percent)) for percent in (0, 25, 50, 75, 100)]


def _round(top: float, whole: bool = False) -> list[float]:
    """Round numbers at even distances from 0 up to ``top``."""
    unit = 10.0 ** math.floor(math.log10(top))
    steps = [unit * part for part in (0.2, 0.25, 0.5, 1.0, 2.0) if not (whole and unit * part % 1)]
    step = next(step for step in steps if step * 5 >= top)
    return [k * step for k in range(int(top / step + 1e-9) + 1)]
