"""The attacks of Carlini & Wagner that seek the nearest adversarial input, in the l2 and the l0 norm."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import MOVED, by_row, pixels
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import Goal

EDGE = 0.9  # the ends of the pixel range, as values of tanh: at 1 it is flat and a black pixel could never move
LARGEST = 1e4  # the c at which a goal that is still not met is given up
Penalty = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
CITATION = """@inproceedings{carlini2017towards,
  title     = {Towards Evaluating the Robustness of Neural Networks},
  author    = {Nicholas Carlini and David Wagner},
  booktitle = {IEEE Symposium on Security and Privacy},
  year      = {2017}
}"""


def energy(delta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The squared l2 norm of each perturbation, and its gradient."""
    return delta.flatten(1).square().sum(1), 2 * delta


@dataclass(frozen=True)
class Descent:
    """Adam on penalty(delta) + c max(kappa - margin, 0), in the w of x = tanh(w) (Carlini & Wagner, 2017, section V).

    ``penalty`` takes perturbations (B, ...) and the rows that they belong to; it answers values (B,) and gradients. In
    the second half the step shrinks to 0, which at a few hundred steps comes closer than a constant one. Ten times on
    the way those rows leave that met the goal at a penalty of at most ``enough``, and with ``abort`` those that have
    not met it yet and whose loss has ceased to fall.
    """

    steps: int
    kappa: float
    abort: bool
    penalty: Penalty = energy
    enough: float = -1.0

    def __call__(
        self, problem: Problem, start: Tensor, c: Tensor, rate: Tensor, free: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The input of least penalty whose margin is kappa or more, and that penalty, (B,).

        Where there is none: the last input, and infinity. Coordinates that are not ``free`` stay as they are.
        """
        threat, part, rows = problem.threat, problem, torch.arange(len(problem), device=start.device)
        middle, half = (threat.upper + threat.lower) / 2, (threat.upper - threat.lower) / 2 / EDGE
        w = ((start - middle) / half).clamp(-EDGE, EDGE).atanh()
        adam, end = Adam.at(w), math.atanh(EDGE)
        best, least = start.clone(), torch.full_like(c, torch.inf)
        lowest, before = least.clone(), least.clone()
        for k in range(1, self.steps + 1):
            tanh = w.tanh()
            x = (tanh * half).add_(middle).clamp_(threat.lower, threat.upper)
            x = x if free is None else torch.where(free, x, part.x)
            gradient, logits = part.gradient(x, self._reached)
            value, slope = self.penalty(x - part.x, rows)
            margin = part.goal.margin(logits)
            better = part.goal.met(logits) & (margin >= self.kappa) & (value < least[rows])
            best[rows[better]], least[rows[better]] = x[better], value[better]
            lowest = torch.minimum(lowest, value + c * (self.kappa - margin).clamp_min(0))
            length = by_row(rate * min(1.0, 2 - 2 * (k - 1) / self.steps), w)
            w.addcmul_(adam.smooth((slope - by_row(c, x) * gradient) * (1 - tanh.square())), length, value=-1).clamp_(
                -end, end
            )
            if k % max(1, self.steps // 10) == 0:
                never = least[rows].isinf()
                best[rows[never]] = x[never]
                stay = (least[rows] > self.enough) & ((lowest <= 0.9999 * before) | ~never | (not self.abort))
                if not stay.any():
                    break
                part, rows, w, adam, c, rate = part[stay], rows[stay], w[stay], adam[stay], c[stay], rate[stay]
                before, lowest = lowest[stay], lowest[stay]
                free = None if free is None else free[stay]
        return best, least

    def _reached(self, goal: Goal, logits: Tensor) -> Tensor:
        return goal.margin(logits).clamp_max(self.kappa)


@dataclass
class Adam:
    """Running means of gradients and of their squares (Kingma & Ba, 2015), row by row."""

    mean: Tensor
    square: Tensor
    count: int = 0

    @classmethod
    def at(cls, w: Tensor) -> "Adam":
        return cls(torch.zeros_like(w), torch.zeros_like(w))

    def __getitem__(self, mask: Tensor) -> "Adam":
        return Adam(self.mean[mask], self.square[mask], self.count)

    def smooth(self, gradient: Tensor) -> Tensor:
        """A step against which to go, of size about one in every coordinate."""
        self.count += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = self.square.sqrt().mul_((1 - 0.999**self.count) ** -0.5).add_(1e-8)
        return (self.mean / scale).div_(1 - 0.9**self.count)


@attack("cw")
@dataclass(frozen=True)
class CW:
    """The nearest input that meets the goal with a margin of ``kappa`` (Carlini & Wagner, 2017).

    Under l2 (section VI-A) ``search_steps`` descents on |delta|^2 + c max(kappa - margin, 0): between them a binary
    search, kept per input, lowers c where the goal was met and raises it where not. Under l0 (section VI-B) descents
    from the last one's end, each on fewer pixels: where the goal was met, the share ``drop`` of the pixels in use that
    did least for the margin is given back, and where not, c grows tenfold, at most to 10,000. A descent has at most
    ``steps`` steps, of length ``rate`` and in the second half down to 0; with ``abort`` it has fewer where c proves too
    small. The authors used search_steps=9, steps=10000, rate=0.01 and initial_c=0.001.
    """

    search_steps: int = 9
    steps: int = 200
    rate: float = 0.05
    initial_c: float = 1.0
    kappa: float = 0.0
    abort: bool = True
    drop: float = 0.1

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"l2", "l0"})
    minimises: ClassVar[bool] = True
    bibtex: ClassVar[str] = CITATION

    def __post_init__(self) -> None:
        if self.search_steps < 1 or self.steps < 1:
            raise ValueError("search_steps and steps must be 1 or more")
        if not self.rate > 0 or not self.initial_c > 0:
            raise ValueError("rate and initial_c must be above 0")
        if not self.kappa >= 0:
            raise ValueError(f"kappa must be 0 or more, not {self.kappa:g}")
        if not 0 < self.drop < 1:
            raise ValueError(f"drop must be between 0 and 1, not {self.drop:g}")

    def __call__(self, problem: Problem) -> Tensor:
        return self._fewest(problem) if problem.threat.norm.name == "l0" else self._nearest(problem)

    def _nearest(self, problem: Problem) -> Tensor:
        descend = Descent(self.steps, self.kappa, self.abort)
        c = torch.full_like(problem.distance, self.initial_c)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        found, distance, rate = problem.x, high, torch.full_like(c, self.rate)
        for _ in range(self.search_steps):
            x, size = descend(problem, problem.x, c, rate)
            found = torch.where(by_row((size < distance) | distance.isinf(), x), x, found)
            distance = torch.minimum(distance, size)
            low, high = torch.where(size.isinf(), c, low), torch.where(size.isinf(), high, c)
            c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
        return found

    def _fewest(self, problem: Problem) -> Tensor:
        descend = Descent(self.steps, self.kappa, self.abort, enough=torch.inf)
        found, free = problem.x.clone(), torch.ones_like(problem.x, dtype=torch.bool)
        c, ever = torch.full_like(problem.distance, self.initial_c), torch.zeros_like(problem.open)
        left, rate = torch.arange(len(c), device=c.device), torch.full_like(c, self.rate)
        while len(left):
            x, size = descend(problem[left], found[left], c[left], rate[left], free[left])
            met = size.isfinite()
            take = met | ~ever[left]
            found[left[take]], ever[left[met]] = x[take], True
            free[left[met]] = self._worth(problem[left[met]], x[met])
            c[left[~met]] *= 10
            left = left[free[left].flatten(1).any(1) & (c[left] <= LARGEST)]
        return found

    def _worth(self, problem: Problem, x: Tensor) -> Tensor:
        """The pixels that ``x`` changes, without the share that by its first derivative does least for the margin."""
        gradient, _ = problem.gradient(x, Goal.margin)
        delta = x - problem.x
        gain, moved = (gradient * delta).abs(), (pixels(delta) > MOVED).flatten(1)
        gain = (gain.sum(1) if x.dim() == 4 else gain).flatten(1).masked_fill(~moved, -1)
        used = moved.sum(1, keepdim=True)
        spare = moved.shape[1] - used + (self.drop * used).long().clamp_min(1)
        kept = gain.argsort(1).argsort(1) >= spare
        return kept.view_as(pixels(delta)).unsqueeze(1).expand_as(x) if x.dim() == 4 else kept
