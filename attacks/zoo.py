"""Zeroth-order optimisation: the attack of Carlini & Wagner by an attacker who sees only scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.norms import by_row, pixels
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import ThreatModel

EDGE = 0.9  # the ends of the pixel range, as values of tanh: at 1 it is flat and a black pixel could never move
PIECE = 2**20  # how many numbers are put before the model at once: what a cache holds
FLAT = 0.1  # the least curvature that Newton trusts
REGIONS = 8  # of equal importance, along a side of the image


@attack("zoo")
@dataclass(frozen=True)
class ZOO:
    """Stochastic coordinate descent on |x - clean|^2 + c max(kappa - margin, 0) (Chen et al., 2017, algorithm 1).

    The margin is between log-probabilities (equation 4), which is that between logits. Each step picks ``coordinates``
    variables, estimates the derivatives by symmetric differences of ``width`` (equations 6 and 7) and moves each by
    Newton's rule or ADAM's (algorithms 2 and 3), scaled by ``rate``, which in the second half of a descent falls to 0.
    The variables are the changes of the pixels, or with ``tanh`` those of w in x = tanh(w). There are ``search_steps``
    descents or more, since one that has ceased to improve ends early; between them a binary search, kept per input,
    lowers c where the goal was met and raises it where not. A step costs two queries a variable, and one that checks
    progress. ``queries`` is the most that an input costs.

    For larger images: ``coarse`` is the side of a grid of variables to begin with, which doubles until it is the
    image's (section 3.4), and ``importance`` picks variables by how much the pixels around them have changed (3.5).
    The authors used solver=adam, tanh=true, rate=0.01, search_steps=9 and initial_c=0.01.
    """

    queries: int = 20_000
    search_steps: int = 4
    coordinates: int = 128
    solver: Literal["newton", "adam"] = "newton"
    tanh: bool = False
    rate: float = 0.5
    width: float = 0.01
    initial_c: float = 1.0
    kappa: float = 0.0
    coarse: int | None = None
    importance: bool = False

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimises: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{chen2017zoo,
  title     = {{ZOO}: Zeroth Order Optimization Based Black-box Attacks to Deep Neural Networks without Training
               Substitute Models},
  author    = {Pin-Yu Chen and Huan Zhang and Yash Sharma and Jinfeng Yi and Cho-Jui Hsieh},
  booktitle = {ACM Workshop on Artificial Intelligence and Security},
  year      = {2017}
}"""

    def __post_init__(self) -> None:
        if self.queries < 3 or self.search_steps < 1 or self.coordinates < 1:
            raise ValueError("queries must be 3 or more, search_steps and coordinates 1 or more")
        if not min(self.rate, self.width, self.initial_c) > 0:
            raise ValueError("rate, width and initial_c must be above 0")
        if not self.kappa >= 0:
            raise ValueError(f"kappa must be 0 or more, not {self.kappa:g}")
        if self.coarse is not None and self.coarse < 1:
            raise ValueError(f"coarse must be 1 or more, not {self.coarse}")

    def __call__(self, problem: Problem) -> Tensor:
        size = problem.x[0].numel()
        together = max(1, PIECE // (size * (2 * min(self.coordinates, size) + 1)))
        rows = torch.arange(len(problem), device=problem.x.device)
        last = torch.cat([self._attack(problem[some]) for some in rows.split(together)])
        return torch.where(by_row(problem.distance.isfinite(), last), problem.best, last)

    def _attack(self, problem: Problem) -> Tensor:
        """Where the last descent of each input has got to."""
        canvas = Canvas(problem.x, problem.threat, self.tanh)
        shapes = canvas.shapes(self.coarse)
        z = problem.x.new_zeros(len(problem), *shapes[0])
        search = Search(z, self.initial_c, self.queries / self.search_steps)
        for level, shape in enumerate(shapes):
            z, search.best = enlarged(z, shape), enlarged(search.best, shape)
            rule = RULES[self.solver](z)
            sweep = math.ceil(z[0].numel() / self.coordinates)  # steps in which each variable has its turn
            count = math.ceil(z[0].numel() / sweep)
            for step in range(self.queries // len(shapes) // (2 * count + 1)):
                noise = problem.noise.at("level", level, "sweep", step // sweep)
                if self.importance and (level or step >= sweep):
                    index = important(noise.at("step", step), canvas.change(z) + canvas.change(search.best), z, count)
                else:
                    first = min(step % sweep * count, z[0].numel() - count)
                    index = noise.permutation(z.flatten(1))[:, first : first + count]
                margin, value, slope, bend = self._probe(problem, canvas, z, search.c, index)
                length = self.rate * (2 - 2 * search.spent / search.length).clamp(0, 1).unsqueeze(1)
                search.note(z, (margin > 0) & (margin >= self.kappa), value, cost=2 * count + 1)
                z = canvas.confine(z.flatten(1).scatter_add(1, index, -length * rule(index, slope, bend)).view_as(z))
                if search.over.any():
                    z = search.restart(z)
                    rule.forget(search.over)
        return canvas.image(z.unsqueeze(1))[:, 0]

    def _probe(self, problem: Problem, canvas: "Canvas", z: Tensor, c: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """Margin and objective at ``z``, (B,), and the objective's first two derivatives along ``index``, (B, K)."""
        where = torch.cat([index[:, :1], index, index], 1)
        by = torch.cat(
            [z.new_zeros(1), z.new_full(index.shape[1:], self.width), z.new_full(index.shape[1:], -self.width)]
        )
        room = max(1, PIECE // problem.x.numel())
        margins, values = [], []
        for some, change in zip(where.split(room, 1), by.split(room)):
            near = z.flatten(1).unsqueeze(1).repeat(1, len(change), 1)
            near.scatter_add_(2, some.unsqueeze(2), change.view(1, -1, 1).expand(len(z), -1, 1))
            x = canvas.image(near.view(*near.shape[:2], *z.shape[1:]))
            margins.append(problem.goal.margin(problem.logits(x)))
            distance = x.sub_(problem.x.unsqueeze(1)).flatten(2).square_().sum(2)
            values.append(distance + c.unsqueeze(1) * (self.kappa - margins[-1]).clamp_min(0))
        value, up, down = torch.cat(values, 1).split([1, *index.shape[1:], *index.shape[1:]], 1)
        slope, bend = (up - down) / (2 * self.width), (up - 2 * value + down) / self.width**2
        seen = slope.isfinite()
        slope = slope.where(seen | ~seen.any(1, keepdim=True), 0)  # an input of which nothing is seen becomes NaN
        return margins[0][:, 0], value[:, 0], slope, bend


class Canvas:
    """Inputs as functions of variables z, (B, ...): as many as an input has numbers, or fewer in a coarse grid."""

    def __init__(self, clean: Tensor, threat: ThreatModel, tanh: bool) -> None:
        self.clean, self.tanh = clean, tanh
        self.middle, self.half = (threat.upper + threat.lower) / 2, (threat.upper - threat.lower) / 2 / EDGE
        self.origin = ((clean - self.middle) / self.half).atanh() if tanh else clean
        self.lower, self.upper = (-math.atanh(EDGE), math.atanh(EDGE)) if tanh else (threat.lower, threat.upper)

    def shapes(self, coarse: int | None) -> list[tuple[int, ...]]:
        """Those of the variables of one input, from the coarsest grid to the input's own."""
        whole = tuple(self.clean.shape[1:])
        if coarse is None or len(whole) < 3 or coarse >= max(whole[1:]):
            return [whole]
        return [(whole[0], min(coarse, whole[1]), min(coarse, whole[2])), *self.shapes(2 * coarse)]

    def image(self, z: Tensor) -> Tensor:
        """The inputs of K candidates each, (B, K, ...)."""
        z = enlarged(z.flatten(0, 1), self.clean.shape[1:]).view(*z.shape[:2], *self.clean.shape[1:])
        w = (z + self.origin.unsqueeze(1)).clamp_(self.lower, self.upper)
        return w.tanh_().mul_(self.half).add_(self.middle) if self.tanh else w

    def confine(self, z: Tensor) -> Tensor:
        """Variables moved back to where the input still depends on them; those of a coarse grid are left alone."""
        return (z + self.origin).clamp_(self.lower, self.upper).sub_(self.origin) if z.shape == self.clean.shape else z

    def change(self, z: Tensor) -> Tensor:
        """How far each pixel has moved: (B, H, W), or (B, 1, D) for vectors."""
        change = pixels(self.image(z.unsqueeze(1))[:, 0] - self.clean)
        return change if change.dim() == 3 else change.unsqueeze(1)


def enlarged(z: Tensor, shape: Sequence[int]) -> Tensor:
    """Variables (B, ...) stretched bilinearly to another ``shape``."""
    return z if z.shape[1:] == tuple(shape) else F.interpolate(z, tuple(shape[1:]), mode="bilinear")


def important(noise: Noise, change: Tensor, z: Tensor, count: int) -> Tensor:
    """Different variables of each input, (B, count), the likelier the larger the largest change in their region.

    Drawn without replacement by the largest of u ** (1 / weight) (Efraimidis & Spirakis, 2006). A tenth of the mean
    weight goes to every region, so that none is out of reach for ever.
    """
    regions = F.adaptive_max_pool2d(change.unsqueeze(1), [min(REGIONS, side) for side in change.shape[1:]])
    regions = regions + (0.1 * regions.mean((1, 2, 3), keepdim=True)).clamp_min(1e-9)
    weight = F.interpolate(regions, z.shape[2:] if z.dim() == 4 else change.shape[1:])
    weight = weight.expand(-1, z[0].numel() // weight[0].numel(), -1, -1).flatten(1)
    return (noise.uniform(weight).clamp_min(1e-9).log() / weight).topk(count, 1).indices


class Newton:
    """A step to where the parabola through three points is least; if nowhere, down its slope (algorithm 3)."""

    def __init__(self, z: Tensor) -> None:
        pass

    def __call__(self, index: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        return slope / torch.where(bend > 0, bend.clamp_min(FLAT), 1)

    def forget(self, rows: Tensor) -> None:
        pass


class Adam:
    """Running means of slopes and of their squares, each variable by its own count of turns (algorithm 2)."""

    def __init__(self, z: Tensor) -> None:
        self.mean, self.square, self.turns = (torch.zeros_like(z.flatten(1)) for _ in range(3))

    def __call__(self, index: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        mean = 0.9 * self.mean.gather(1, index) + 0.1 * slope
        square = 0.999 * self.square.gather(1, index) + 0.001 * slope.square()
        turns = self.turns.gather(1, index) + 1
        for kept, new in ((self.mean, mean), (self.square, square), (self.turns, turns)):
            kept.scatter_(1, index, new)
        return mean / (1 - 0.9**turns) / ((square / (1 - 0.999**turns)).sqrt() + 1e-8)

    def forget(self, rows: Tensor) -> None:
        for kept in (self.mean, self.square, self.turns):
            kept[rows] = 0


RULES: dict[str, type[Newton] | type[Adam]] = {"newton": Newton, "adam": Adam}


class Search:
    """The descents of each input and the binary search over their c: tensors of shape (B,), and the nearest z."""

    def __init__(self, z: Tensor, c: float, length: float) -> None:
        nothing = torch.full_like(z.flatten(1)[:, 0], torch.inf)
        self.best, self.least = z, nothing
        self.c, self.low, self.high = torch.full_like(nothing, c), torch.zeros_like(nothing), nothing
        self.length, self.spent = length, torch.zeros_like(nothing)
        self.lowest, self.before = nothing, nothing
        self.better = self.over = nothing.isfinite()

    def note(self, z: Tensor, met: Tensor, value: Tensor, cost: int) -> None:
        """Keeps the nearest ``z`` that met the goal (there the objective is the distance); is the descent over?"""
        nearer = met & (value < self.least)
        self.best, self.least = torch.where(by_row(nearer, z), z, self.best), torch.where(nearer, value, self.least)
        self.better = self.better | nearer
        self.lowest = torch.minimum(self.lowest, value)
        tenth = (10 * self.spent / self.length).floor()
        self.spent = self.spent + cost
        check = (10 * self.spent / self.length).floor() > tenth
        self.over = (self.spent >= self.length) | (check & (self.lowest > 0.9999 * self.before))
        self.before = torch.where(check, self.lowest, self.before)

    def restart(self, z: Tensor) -> Tensor:
        """Another c where the descent is over: less if it came nearer, else more; from the nearest found, if any."""
        over, raised = self.over, self.over & ~self.better
        self.low, self.high = torch.where(raised, self.c, self.low), torch.where(over & self.better, self.c, self.high)
        self.c = torch.where(over, torch.where(self.high.isinf(), 10 * self.c, (self.low + self.high) / 2), self.c)
        self.spent, self.better = torch.where(over, 0, self.spent), self.better & ~over
        self.lowest, self.before = (torch.where(over, torch.inf, kept) for kept in (self.lowest, self.before))
        return torch.where(by_row(over & self.least.isfinite(), z), self.best, z)
