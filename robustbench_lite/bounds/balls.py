"""What an adversary may reach around each input, and the least that a linear function takes there."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustbench_lite.bounds.maps import Terms
from robustbench_lite.bounds.relax import Interval
from robustbench_lite.threat import ThreatModel

NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Ball:
    """The inputs that ``threat`` allows around ``x`` (B, ...); a pixel range from -inf to inf does not clip the ball.

    Raises:
        ValueError: for a norm or an eps without bounds, or inputs outside the pixel range.
    """

    x: Tensor
    threat: ThreatModel

    def __post_init__(self) -> None:
        if self.threat.norm.name not in NORMS:
            raise ValueError(f"there are bounds for {', '.join(NORMS)}, not for {self.threat.norm.name}")
        if math.isinf(self.threat.eps):
            raise ValueError("there are no bounds for an infinite eps")
        if not self.threat.inside(self.x).all():
            raise ValueError(f"inputs lie outside [{self.threat.lower:g}, {self.threat.upper:g}]")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def is_box(self) -> bool:
        return self.threat.norm.name == "linf"

    @cached_property
    def box(self) -> Interval:
        """The smallest box around it."""
        lower = (self.x - self.threat.eps).clamp_min(self.threat.lower)
        return Interval(lower, (self.x + self.threat.eps).clamp_max(self.threat.upper))

    def minimum(self, terms: Terms) -> Tensor:
        """The least value of each linear function: (N,)."""
        lower, upper = self.box
        if self.is_box:
            return terms.least(lower, upper)
        slope = terms.values.flatten(1)
        room = torch.where(terms.values > 0, terms.at(self.x - lower), terms.at(upper - self.x)).flatten(1)
        fall = _fall_l1 if self.threat.norm.name == "l1" else _fall_l2
        return terms.dot(self.x) - fall(slope.abs(), room, self.threat.eps)


def _fall_l1(slope: Tensor, room: Tensor, eps: float) -> Tensor:
    """The most of ``sum(slope * step)`` over steps from 0 to ``room`` that sum up to ``eps``: steepest first."""
    slope, order = slope.sort(dim=1, descending=True)
    room = room.gather(1, order)
    spent = room.cumsum(1) - room
    return (slope * torch.minimum(room, (eps - spent).clamp_min(0))).sum(1)


def _fall_l2(slope: Tensor, room: Tensor, eps: float) -> Tensor:
    """The most of ``sum(slope * step)`` over steps from 0 to ``room`` of length ``eps``.

    By Lagrange duality any multiplier gives a bound, and the one for which the length is just eps gives the maximum: it
    is found by bisection, where ``step = min(slope / multiplier, room)``.
    """
    with torch.no_grad():
        high = torch.linalg.vector_norm(slope, dim=1, keepdim=True) / max(eps, 1e-12)
        low = torch.zeros_like(high)
        for _ in range(30):
            middle = (low + high) / 2
            long = torch.minimum(slope / middle.clamp_min(1e-30), room).square().sum(1, keepdim=True) > eps**2
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    step = torch.minimum(slope / high.clamp_min(1e-30), room)
    fall: Tensor = (slope * step).sum(1) + (high[:, 0] / 2) * (eps**2 - step.square().sum(1))
    return fall
