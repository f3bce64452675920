"""Auto-PGD: gradient ascent that chooses its own step lengths."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbench_lite.norms import by_row
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import Goal

Loss = Callable[[Goal, Tensor], Tensor]

MOMENTUM = 0.75  # the share of a step that follows the gradient; the rest repeats the step before
RISES = 0.75  # the share of steps that must raise the loss for the length to stay


@attack("apgd")
@dataclass(frozen=True)
class APGD:
    """Ascent with momentum whose steps halve where it stalls (Croce & Hein, 2020, algorithm 1).

    ``dlr`` is the difference of logits ratio (equation 6), ``dlr-t`` its targeted form (equation 7), which climbs
    towards each of the ``targets`` most likely other classes in turn; a targeted goal has the targeted form and its own
    class alone. Below 3 classes (targeted: 4), where the ratio may be constant, the difference is not divided.
    """

    steps: int = 100
    restarts: int = 1
    loss: Literal["ce", "dlr", "dlr-t"] = "ce"
    targets: int = 9

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    bibtex: ClassVar[str] = """@inproceedings{croce2020reliable,
  title     = {Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks},
  author    = {Francesco Croce and Matthias Hein},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}"""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.targets < 1:
            raise ValueError("steps, restarts and targets must be 1 or more")

    def __call__(self, problem: Problem) -> Tensor:
        found = problem.x.clone()
        targets = rivals(problem, self.targets) if self.loss == "dlr-t" else problem.goal.labels.unsqueeze(1)
        for restart in range(self.restarts):
            for rank, target in enumerate(targets.unbind(1)):
                working = problem.open
                part = problem[working]
                start = problem.threat.sample(part.noise.at("restart", restart, "target", rank), part.x)
                found[working] = climb(part, start, self._loss(target[working]), self.steps)
        return found

    def _loss(self, target: Tensor) -> Loss:
        if self.loss == "ce":
            return Goal.cross_entropy
        return dlr if self.loss == "dlr" else lambda goal, logits: towards(target)(goal, logits) / spread(logits, 4)


def climb(problem: Problem, x: Tensor, loss: Loss, steps: int) -> Tensor:
    """The point of largest ``loss`` on the way up from ``x``."""
    threat, best, before = problem.threat, x, x
    gradient, top = ask(problem, x, loss)
    slope = gradient
    pace = Pace(torch.full_like(top, 2 * threat.eps), top)
    marks = checkpoints(steps)
    for k in range(1, steps + 1):
        share = MOMENTUM if k > 1 else 1.0
        ahead = threat.project(x + by_row(pace.length, x) * threat.norm.steepest(gradient), problem.x)
        x, before = threat.project(x + share * (ahead - x) + (1 - share) * (x - before), problem.x), x
        if k == steps:
            value = judged(loss, problem, problem.logits(x))
            return torch.where(by_row(value > top, x), x, best)
        gradient, value = ask(problem, x, loss)
        better = by_row(value > top, x)
        best, slope, top = torch.where(better, x, best), torch.where(better, gradient, slope), torch.maximum(value, top)
        pace.watch(value)
        if k in marks:
            if not problem.open.any():
                break
            stalled = by_row(pace.halve(k), x)
            x, gradient = torch.where(stalled, best, x), torch.where(stalled, slope, gradient)
    return best


class Pace:
    """The step ``length`` of each input, (B,), halved at checkpoints where the ascent stalls (section 3.2)."""

    def __init__(self, length: Tensor, loss: Tensor) -> None:
        self.length, self.loss, self.top, self.top_then = length, loss, loss, loss
        self.rises, self.since = torch.zeros_like(loss), 0
        self.halved = torch.zeros_like(loss, dtype=torch.bool)

    def watch(self, loss: Tensor) -> None:
        """Notes the losses after a step."""
        self.rises += loss > self.loss
        self.loss, self.top = loss, torch.maximum(loss, self.top)

    def halve(self, step: int) -> Tensor:
        """At the checkpoint after ``step``: which inputs stall, (B,) bool, and go on from their best point.

        Either too few steps raised the loss (condition 1), or the best loss and the length are those of the checkpoint
        before (condition 2).
        """
        self.halved = (self.rises < RISES * (step - self.since)) | (~self.halved & (self.top <= self.top_then))
        self.length = torch.where(self.halved, self.length / 2, self.length)
        self.loss = torch.where(self.halved, self.top, self.loss)
        self.rises, self.since, self.top_then = torch.zeros_like(self.rises), step, self.top
        return self.halved


def checkpoints(steps: int) -> set[int]:
    """The steps after which lengths may halve: at first 22 % of all apart, at last 6 % (section 3.2)."""
    marks, mark, gap = set(), 22, 22
    while mark <= 100:
        marks.add(-(-mark * steps // 100))
        gap = max(gap - 3, 6)
        mark += gap
    return marks


def ask(problem: Problem, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Gradient and value of ``loss``; a gradient that is not finite points nowhere."""
    gradient, logits = problem.gradient(x, loss)
    return gradient.nan_to_num(nan=0, posinf=0, neginf=0), judged(loss, problem, logits)


def judged(loss: Loss, problem: Problem, logits: Tensor) -> Tensor:
    """The value of ``loss``, -inf where it is no number."""
    return loss(problem.goal, logits).nan_to_num(nan=-torch.inf, posinf=-torch.inf)


def dlr(goal: Goal, logits: Tensor) -> Tensor:
    """The difference of logits ratio: the margin, whatever the scale of the logits."""
    return goal.margin(logits) / spread(logits, 4 if goal.targeted else 3)


def spread(logits: Tensor, count: int) -> Tensor:
    """The largest logit minus the third, or (``count`` 4) the mean of third and fourth; 1 where there is none."""
    if logits.shape[1] < count:
        return torch.ones_like(logits[:, 0])
    ranked = logits.topk(count, dim=1).values
    return (ranked[:, 0] - ranked[:, 2:].mean(1)).clamp_min(1e-12)


def towards(target: Tensor) -> Loss:
    """The logit of ``target`` (B,) minus the label's; for a targeted goal its margin."""

    def lead(goal: Goal, logits: Tensor) -> Tensor:
        if goal.targeted:
            return goal.margin(logits)
        pair = logits.gather(1, torch.stack([target, goal.labels], 1))
        return pair[:, 0] - pair[:, 1]

    return lead


def rivals(problem: Problem, count: int) -> Tensor:
    """The ``count`` most likely classes beside the label, likeliest first, (B, count); of a targeted goal its class."""
    label = problem.goal.labels.unsqueeze(1)
    if problem.goal.targeted:
        return label
    others = problem.logits(problem.x).scatter(1, label, -torch.inf)
    return others.topk(min(count, problem.classes - 1), dim=1).indices
