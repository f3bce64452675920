"""Fast adaptive boundary attack: the nearest adversarial, by steps from boundary to boundary."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import by_row
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import ThreatModel

from .apgd import rivals, towards


@attack("fab")
@dataclass(frozen=True)
class FAB:
    """Steps onto the linearised decision boundary, pulled towards the clean input (Croce & Hein, 2020, algorithm 1).

    The targeted version heads for the boundary with each of the ``targets`` most likely other classes in turn, at one
    gradient a step. ``targets=0`` is the untargeted version, which in every step looks at the boundaries with all
    classes and heads for the nearest. A targeted goal has one boundary. Restarts after the first begin at random, half
    as far away as the best point so far. ``search`` is the number of secant steps of the final search.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    search: int = 3

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimises: ClassVar[bool] = True
    version: ClassVar[int] = 2
    bibtex: ClassVar[str] = """@inproceedings{croce2020minimally,
  title     = {Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack},
  author    = {Francesco Croce and Matthias Hein},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}"""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError("steps and restarts must be 1 or more")
        if self.targets < 0 or self.search < 0:
            raise ValueError("targets and search must be 0 or more")
        if not 0 <= self.alpha_max <= 1 or not 0 < self.beta <= 1:
            raise ValueError("alpha_max must lie in [0, 1] and beta in (0, 1]")
        if not self.eta >= 1:
            raise ValueError(f"eta must be 1 or more, not {self.eta:g}")

    def __call__(self, problem: Problem) -> Tensor:
        found = problem.x.clone()
        anyway = problem.goal.labels.unsqueeze(1)
        targets = rivals(problem, self.targets) if self.targets else anyway
        for restart in range(self.restarts):
            for rank, target in enumerate(targets.unbind(1)):
                working = problem.open
                part = problem[working]
                start = nearby(part, "restart", restart, "target", rank) if restart else part.x
                found[working] = self._walk(part, start, target[working])
        if self.search:
            self._search(problem)
        return torch.where(by_row(problem.distance.isfinite(), found), problem.best, found)

    def _walk(self, problem: Problem, x: Tensor, target: Tensor) -> Tensor:
        """The last point of a walk along the boundary."""
        clean, threat = problem.x, problem.threat
        for _ in range(self.steps):
            weight, lead = self._boundary(problem, x, target)
            here = onto(threat, x, weight, -lead)
            home = onto(threat, clean, weight, inner(weight, x - clean) - lead)
            far, near = threat.norm.size(here), threat.norm.size(home)
            alpha = by_row((far / (far + near).clamp_min(1e-12)).clamp_max(self.alpha_max), x)
            ahead = x.add(here, alpha=self.eta).lerp(clean.add(home, alpha=self.eta), alpha)
            ahead = ahead.clamp(threat.lower, threat.upper)
            x = torch.where(by_row(ahead.flatten(1).sum(1).isfinite(), x), ahead, x)
            hit = problem.goal.met(problem.logits(x))
            x = x.lerp(clean, by_row((1 - self.beta) * hit.to(x), x))
        return x

    def _boundary(self, problem: Problem, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The linearised lead of the other class, below 0 before the boundary: its gradient, and its value at ``x``."""
        if self.targets or problem.goal.targeted:
            lead = towards(target)
            gradient, logits = problem.gradient(x, lead)
            return gradient, lead(problem.goal, logits)
        return nearest_boundary(problem, x)

    def _search(self, problem: Problem) -> None:
        """Secant steps between the clean input and the best point; the ledger keeps what they find."""
        problem = problem[problem.open & problem.distance.isfinite()]
        near, far = problem.x, problem.best
        below, above = (problem.goal.margin(problem.logits(x)) for x in (near, far))
        for _ in range(self.search):
            x = far + by_row(above / (above - below), far) * (near - far)
            value = problem.goal.margin(problem.logits(x))
            hit = value > 0
            near, far = torch.where(by_row(hit, x), near, x), torch.where(by_row(hit, x), x, far)
            below, above = torch.where(hit, below, value), torch.where(hit, value, above)


def onto(threat: ThreatModel, x: Tensor, weight: Tensor, gap: Tensor) -> Tensor:
    """The smallest change, in the threat's norm, with ``weight . change = gap`` (B,) and ``x + change`` in the pixel
    range; where the range is too narrow for that, the change that comes nearest.

    A change of length t moves every coordinate by its part of the steepest step, t times, or up to the end of its
    range. What that gains is a concave, piecewise linear function of t, so that Newton's method from 0 ends exactly:
    in each round the coordinates that have met their end are set apart (appendix A solves it by sorting).
    """
    largest = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny)
    weight, gap = weight / by_row(largest, x), gap / largest
    step = threat.norm.steepest(weight) * by_row(gap.sign(), x)
    way, pace, slope = step.sign(), step.abs(), weight.abs()
    middle, half = (threat.upper + threat.lower) / 2, (threat.upper - threat.lower) / 2
    room = (half - way * (x - middle)).clamp_min(0)
    gain, wanted, gained, length = pace * slope, gap.abs(), torch.zeros_like(gap), torch.zeros_like(gap)
    loose, count = room.sign(), torch.full_like(gap, torch.inf)
    while (going := (now := loose.flatten(1).sum(1)) < count).any():
        free, count = inner(gain, loose), now
        further = torch.where(free > 0, (wanted - gained).clamp_min(0) / free, torch.inf)
        length = torch.where(going, length + further, length).clamp_max(torch.finfo(x.dtype).max / 2)
        ahead = pace * by_row(length, x)
        moved = torch.minimum(ahead, room)
        gained, loose = inner(moved, slope), (room - ahead).sign().clamp_min(0)
    return way * moved


def nearest_boundary(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and value of the lead over the label of the class whose linearised boundary is nearest."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = problem.logits(x)
        slopes = [torch.autograd.grad(logit.sum(), x, retain_graph=True)[0] for logit in logits.unbind(1)]
    label = problem.goal.labels.unsqueeze(1)
    ways, leads = torch.stack(slopes, 1), logits.detach()
    own = label.view(-1, *[1] * x.dim()).expand(-1, 1, *x.shape[1:])
    ways, leads = ways - ways.gather(1, own), leads - leads.gather(1, label)
    flat = ways.flatten(0, 1)
    reach = inner(flat, problem.threat.norm.steepest(flat)).view_as(leads)  # the dual norm
    distance = (leads.abs() / reach.clamp_min(1e-12)).scatter(1, label, torch.inf).nan_to_num(torch.inf)
    nearest = distance.argmin(1)
    each = torch.arange(len(x), device=x.device)
    return ways[each, nearest], leads[each, nearest]


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each row: (B,)."""
    return (one * other).flatten(1).sum(1)


def nearby(problem: Problem, *path: str | int) -> Tensor:
    """A random point, at most half as far away as the best so far and as eps; a wide one where there are neither."""
    x, threat = problem.x, problem.threat
    widest = threat.norm.size(torch.full_like(x, threat.upper - threat.lower)).clamp_max(threat.eps)
    radius = torch.minimum(problem.distance, widest) / 2
    way = threat.norm.sample(problem.noise.at(*path), x, 1.0)
    return (x + by_row(radius, x) * way).clamp(threat.lower, threat.upper)
