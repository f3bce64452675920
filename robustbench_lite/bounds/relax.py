"""What lies between two lines: relaxations of activations over intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Slopes = Literal["adaptive", "zero", "parallel"]
ROUNDS = 40  # of bisection: beyond what float32 resolves, and of no consequence in float64, see Smooth


class Interval(NamedTuple):
    """Bounds on the neurons of a layer, (B, ...) each."""

    lower: Tensor
    upper: Tensor


class Lines(NamedTuple):
    """Above ``lower * x + lower_offset`` (None: 0) and below ``(lower + gap) * x + upper_offset``; (B, ...) each."""

    lower: Tensor
    lower_offset: Tensor | None
    gap: Tensor
    upper_offset: Tensor


class Nonlinear(ABC):
    """A layer that is bounded on its own, given bounds on what goes in."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def interval(self, inside: Interval) -> Interval:
        """Bounds on what comes out."""

    def unsettled(self, inside: Interval) -> Tensor:
        """Which neurons would profit from tighter bounds."""
        return inside.upper > inside.lower

    def lines(self, inside: Interval, slopes: Slopes) -> Lines | None:
        """Lines that hold over the interval; None where only :meth:`interval` is known."""
        return None


@dataclass(frozen=True)
class Rectifier(Nonlinear):
    """ReLU, and with a ``slope`` between 0 and 1 below zero, leaky ReLU.

    The upper line is the chord; the lower goes through zero with a slope that is free (Zhang et al., 2018, section 3;
    parallel to the chord it gives the dual network of Wong & Kolter, 2018).
    """

    slope: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def interval(self, inside: Interval) -> Interval:
        return Interval(self(inside.lower), self(inside.upper))

    def unsettled(self, inside: Interval) -> Tensor:
        return (inside.lower < 0) & (inside.upper > 0)

    def lines(self, inside: Interval, slopes: Slopes) -> Lines:
        lower, upper = inside
        open_ = self.unsettled(inside)
        fixed = self._either(lower >= 0, lower)
        width = torch.where(open_, upper - lower, 1)
        chord = torch.where(open_, (upper - self.slope * lower) / width, fixed)
        offset = torch.where(open_, (self.slope - chord) * lower, 0)
        if slopes == "parallel":
            below = chord
        elif slopes == "zero":
            below = fixed
        else:
            below = torch.where(open_, self._either(upper > -lower, lower), fixed)
        return Lines(below, None, chord - below, offset)

    def _either(self, above: Tensor, like: Tensor) -> Tensor:
        """The slope above zero or the one below, in full precision."""
        return self.slope + (1 - self.slope) * above.to(like)


@dataclass(frozen=True)
class Smooth(Nonlinear):
    """A differentiable activation whose derivative is monotone between neighbouring ``inflections``.

    For any slope the tightest offset follows from the points where the derivative equals the slope, one at most in each
    piece: soundness rests on the offsets, and the slopes are only a choice. Errors of bisection enter squared.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inflections: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def interval(self, inside: Interval) -> Interval:
        flat = torch.zeros_like(inside.lower)
        return Interval(*self._offsets(inside, flat))

    def lines(self, inside: Interval, slopes: Slopes) -> Lines:
        lower, upper = inside
        middle = (lower + upper) / 2
        narrow = upper - lower < 1e-3
        width = torch.where(narrow, 1, upper - lower)
        chord = torch.where(narrow, self.derivative(middle), (self(upper) - self(lower)) / width)
        if slopes == "parallel":
            below, above = self._offsets(inside, chord)
            return Lines(chord, below, torch.zeros_like(chord), above)
        choices = torch.stack([chord, self.derivative(lower), self.derivative(upper), self.derivative(middle)])
        below, above = self._offsets(inside, choices)
        high = (choices * middle + above).argmin(0, keepdim=True)
        upper, upper_offset = choices.gather(0, high)[0], above.gather(0, high)[0]
        if slopes == "zero":
            return Lines(torch.zeros_like(chord), self.interval(inside).lower, upper, upper_offset)
        low = (choices * middle + below).argmax(0, keepdim=True)
        least, least_offset = choices.gather(0, low)[0], below.gather(0, low)[0]
        return Lines(least, least_offset, upper - least, upper_offset)

    def _offsets(self, inside: Interval, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of ``f(x) - slope * x`` over the interval."""
        edges = [-math.inf, *self.inflections, math.inf]
        points = [inside.lower.expand_as(slope), inside.upper.expand_as(slope)]
        for left, right in pairwise(edges):
            start = torch.minimum(inside.lower.clamp_min(left), inside.upper)
            stop = torch.maximum(inside.upper.clamp_max(right), inside.lower)
            touches = (self.derivative(start) < slope) != (self.derivative(stop) < slope)
            tangent = self._tangent(start.expand_as(slope), stop.expand_as(slope), slope)
            points.append(torch.where(touches, tangent, points[0]))
        rest = torch.stack([self(point) - slope * point for point in points])
        return rest.amin(0), rest.amax(0)

    @torch.no_grad()
    def _tangent(self, left: Tensor, right: Tensor, slope: Tensor) -> Tensor:
        """Where from ``left`` to ``right`` the derivative is ``slope``."""
        falling = self.derivative(left) > self.derivative(right)
        for _ in range(ROUNDS):
            middle = (left + right) / 2
            beyond = (self.derivative(middle) < slope) == falling
            left, right = torch.where(beyond, left, middle), torch.where(beyond, middle, right)
        return (left + right) / 2


@dataclass(frozen=True)
class Largest(Nonlinear):
    """The largest of some neurons each, as in max pooling."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def interval(self, inside: Interval) -> Interval:
        return Interval(self(inside.lower), self(inside.upper))


def _normal(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _logistic_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


SIGMOID = Smooth(torch.sigmoid, _logistic_slope, (0.0,))
TANH = Smooth(torch.tanh, lambda x: 1 - torch.tanh(x).square(), (0.0,))
GELU = Smooth(
    torch.nn.functional.gelu,
    lambda x: torch.special.ndtr(x) + x * _normal(x),
    (-math.sqrt(2), math.sqrt(2)),
)
SILU = Smooth(
    torch.nn.functional.silu,
    lambda x: torch.sigmoid(x) + x * _logistic_slope(x),
    (-2.399357280520548, 2.399357280520548),  # x tanh(x / 2) = 2
)
