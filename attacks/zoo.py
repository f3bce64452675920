"""Zeroth-order optimisation: the attack of Carlini & Wagner by an attacker who sees only scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.norms import by_row, pixels
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import ThreatModel

EDGE = 0.9  # the ends of the pixel range, as values of tanh: at 1 it is flat and a black pixel could never move
PIECE = 2**20  # how many numbers are put before the model at once: what a cache holds
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
        for rows in torch.arange(len(problem), device=problem.x.device).split(together):
            self._attack(problem[rows])
        return problem.best

    def _attack(self, problem: Problem) -> None:
        canvas = Canvas(problem.x, problem.threat, self.tanh)
        shapes = list(canvas.shapes(self.coarse))
        search = Search(torch.zeros(len(problem), *shapes[0]).to(problem.x), self.initial_c)
        for level, shape in enumerate(shapes):
            search.enlarge(shape)
            size = math.prod(shape)
            sweep = math.ceil(size / self.coordinates)  # steps in which each variable has its turn
            count = math.ceil(size / sweep)
            for step in range(self.queries // len(shapes) // (2 * count + 1)):
                turn, noise = step % sweep, problem.noise.at("level", level, "sweep", step // sweep)
                if self.importance and (level or step >= sweep):
                    index = canvas.changed(search.z, search.best, noise.at("step", turn), count)
                else:
                    first = min(turn * count, size - count)
                    index = noise.permutation(search.z.flatten(1))[:, first : first + count]
                margin, value, slope, bend = self._probe(problem, canvas, search.z, search.c, index)
                search.note(margin, value, self.kappa)
                length = self.rate * (2 - 2 * search.spent / (self.queries / self.search_steps)).clamp(0, 1)
                rule = newton(slope, bend) if self.solver == "newton" else search.adam(index, slope)
                search.z = canvas.confine(search.z.flatten(1).scatter_add(1, index, -length.unsqueeze(1) * rule).view_as(search.z))
                search.spent += 2 * count + 1
                search.restart(self.queries / self.search_steps)

    def _probe(self, problem: Problem, canvas: "Canvas", z: Tensor, c: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """Margin and objective at ``z``, (B,), and the objective's first two derivatives along ``index``, (B, K)."""
        where = torch.cat([index[:, :1], index, index], 1)
        move = torch.cat([index.new_zeros(1), torch.ones_like(index[0]), -torch.ones_like(index[0])]) * self.width
        margins, values = [], []
        for some, by in zip(*(t.split(max(1, PIECE // canvas.clean.numel()), -1) for t in (where, move.to(z)))):
            near = z.flatten(1).unsqueeze(1).repeat(1, len(by), 1)
            near.scatter_add_(2, some.unsqueeze(2), by.view(1, -1, 1).expand(len(z), -1, 1))
            x = canvas.image(near.view(*near.shape[:2], *z.shape[1:]))
            margins.append(problem.goal.margin(problem.logits(x)))
            distance = x.sub_(canvas.clean.unsqueeze(1)).flatten(2).square_().sum(2)
            values.append(distance + c.unsqueeze(1) * (self.kappa - margins[-1]).clamp_min(0))
        value, up, down = torch.cat(values, 1).nan_to_num().split([1, index.shape[1], index.shape[1]], 1)
        slope, bend = (up - down) / (2 * self.width), (up - 2 * value + down) / self.width**2
        return margins[0][:, 0], value[:, 0], slope, bend


def newton(slope: Tensor, bend: Tensor) -> Tensor:
    """Where the objective is not convex, a plain gradient step (algorithm 3); elsewhere not more than ten of them."""
    return slope / torch.where(bend > 0, bend.clamp_min(0.1), 1)


@dataclass(frozen=True)
class Canvas:
    """Inputs as functions of variables z, (B, K, ...), as many as the input has numbers or, in a coarse grid, fewer."""

    clean: Tensor
    threat: ThreatModel
    tanh: bool

    @property
    def _middle(self) -> float:
        return (self.threat.upper + self.threat.lower) / 2

    @property
    def _half(self) -> float:
        return (self.threat.upper - self.threat.lower) / 2 / EDGE

    def shapes(self, coarse: int | None) -> Iterator[tuple[int, ...]]:
        """Those of the variables of one input, from the coarsest grid to the input's own."""
        whole = tuple(self.clean.shape[1:])
        while coarse is not None and len(whole) == 3 and coarse < max(whole[1:]):
            yield whole[0], min(coarse, whole[1]), min(coarse, whole[2])
            coarse *= 2
        yield whole

    def image(self, z: Tensor) -> Tensor:
        delta, clean = enlarged(z, self.clean.shape[1:]), self.clean.unsqueeze(1)
        if self.tanh:
            origin = ((clean - self._middle) / self._half).atanh()
            delta = (delta + origin).tanh_().mul_(self._half)
            return delta.add_(self._middle).clamp_(self.threat.lower, self.threat.upper)
        return (delta + clean).clamp_(self.threat.lower, self.threat.upper)

    def confine(self, z: Tensor) -> Tensor:
        """Variables that stay where the input depends on them; a coarse grid's are left alone."""
        if z.shape != self.clean.shape:
            return z
        if self.tanh:
            origin = ((self.clean - self._middle) / self._half).atanh()
            return (z + origin).clamp(-math.atanh(EDGE), math.atanh(EDGE)) - origin
        return (z + self.clean).clamp(self.threat.lower, self.threat.upper) - self.clean

    def changed(self, z: Tensor, best: Tensor, noise, count: int) -> Tensor:
        """Different variables of each input, (B, count), the likelier the more the pixels around them have changed."""
        change = sum(pixels(self.image(v.unsqueeze(1))[:, 0] - self.clean) for v in (z, best))
        plane = change if change.dim() == 3 else change.unsqueeze(1)
        regions = F.adaptive_max_pool2d(plane.unsqueeze(1), tuple(min(REGIONS, side) for side in plane.shape[1:]))
        size = z.shape[2:] if z.dim() == 4 else plane.shape[1:]
        weight = F.interpolate(regions, tuple(size)).expand(-1, z.shape[1] if z.dim() == 4 else 1, -1, -1).flatten(1)
        weight = (weight + 0.1 * weight.mean(1, keepdim=True)).clamp_min(1e-9)
        return (noise.uniform(weight).clamp_min(1e-9).log() / weight).topk(count, 1).indices


def enlarged(z: Tensor, shape) -> Tensor:
    """Variables (B, K, ...) stretched to inputs of another ``shape``, bilinearly."""
    if z.shape[2:] == shape:
        return z
    return F.interpolate(z.flatten(0, 1), tuple(shape[1:]), mode="bilinear").view(*z.shape[:2], *shape)


class Search:
    """Where each input's descent has got to, and the binary search over its c."""

    def __init__(self, z: Tensor, c: float) -> None:
        self.z, self.best = z, z.clone()
        self.least = torch.full_like(z.flatten(1)[:, 0], torch.inf)
        self.c, self.low, self.high = torch.full_like(self.least, c), torch.zeros_like(self.least), self.least
        self.spent, self.met = torch.zeros_like(self.least), torch.zeros_like(self.least, dtype=torch.bool)
        self.lowest, self.before = self.least, self.least
        self.reset()

    def reset(self):
        self.mean, self.square, self.turns = (torch.zeros_like(self.z.flatten(1)) for _ in range(3))

    def enlarge(self, shape) -> None:
        if self.z.shape[1:] != shape:
            self.z, self.best = (enlarged(v.unsqueeze(1), shape)[:, 0] for v in (self.z, self.best))
            self.reset()

    def adam(self, index: Tensor, slope: Tensor) -> Tensor:
        """Running means of slopes and of their squares, each variable by its own count (algorithm 2)."""
        mean = 0.9 * self.mean.gather(1, index) + 0.1 * slope
        square = 0.999 * self.square.gather(1, index) + 0.001 * slope.square()
        turns = self.turns.gather(1, index) + 1
        for kept, new in ((self.mean, mean), (self.square, square), (self.turns, turns)):
            kept.scatter_(1, index, new)
        return mean / (1 - 0.9**turns) / ((square / (1 - 0.999**turns)).sqrt() + 1e-8)

    WARM = True
    ABORT = True
    def note(self, margin: Tensor, value: Tensor, kappa: float) -> None:
        distance = value
        hit = margin > kappa if kappa == 0 else margin >= kappa
        better = hit & (value < self.least)
        self.best = torch.where(by_row(better, self.z), self.z, self.best)
        self.least = torch.where(better, value, self.least)
        self.met = self.met | hit
        self.lowest = torch.minimum(self.lowest, value)

    def restart(self, length: float) -> None:
        over = self.spent >= length
        if self.ABORT:
            pass
        if not over.any():
            return
        self.low, self.high = torch.where(over & ~self.met, self.c, self.low), torch.where(over & self.met, self.c, self.high)
        self.c = torch.where(over, torch.where(self.high.isinf(), 10 * self.c, (self.low + self.high) / 2), self.c)
        start = self.best if self.WARM else torch.zeros_like(self.best)
        self.z = torch.where(by_row(over, self.z), torch.where(by_row(self.least.isfinite(), self.z), start, self.z if self.WARM else start), self.z)
        for kept in (self.mean, self.square, self.turns):
            kept[over] = 0
        self.spent = torch.where(over, 0, self.spent)
        self.met = self.met & ~over
        self.lowest, self.before = torch.where(over, torch.inf, self.lowest), torch.where(over, torch.inf, self.before)
