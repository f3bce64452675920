"""DeepFool: the nearest boundary of a model made linear, again and again."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import by_row
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import Goal

FURTHER = 1e-4  # added to each step's length, so that an input on the boundary does not stay there


@attack("deepfool")
@dataclass(frozen=True)
class DeepFool:
    """Steps to the nearest linearised boundary until one is crossed (Moosavi-Dezfooli et al., 2016, algorithm 2).

    Boundaries are those of the ``candidates`` most likely other classes; a targeted attack has one, the target's with
    the best other class. The model is asked ``overshoot`` beyond the sum of the steps, clipped to the pixel range;
    coordinates held at a bound take no part in a step.
    """

    steps: int = 50
    candidates: int = 10
    overshoot: float = 0.02

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"l2", "linf"})
    minimises: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{moosavi2016deepfool,
  title     = {{DeepFool}: A Simple and Accurate Method to Fool Deep Neural Networks},
  author    = {Seyed-Mohsen Moosavi-Dezfooli and Alhussein Fawzi and Pascal Frossard},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2016}
}"""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.candidates < 1:
            raise ValueError("steps and candidates must be 1 or more")
        if not self.overshoot >= 0:
            raise ValueError(f"overshoot must be 0 or more, not {self.overshoot:g}")

    def __call__(self, problem: Problem) -> Tensor:
        threat, clean = problem.threat, problem.x
        x, walked = clean.clone(), torch.zeros_like(clean)
        left = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            part = problem[left]
            walked[left] += self._step(part, x[left])
            walked[left] = (part.x + walked[left]).clamp(threat.lower, threat.upper) - part.x
            x[left] = (part.x + (1 + self.overshoot) * walked[left]).clamp(threat.lower, threat.upper)
            left = left[~part.goal.met(part.logits(x[left]))]
            if not len(left):
                break
        return x

    def _step(self, problem: Problem, x: Tensor) -> Tensor:
        """From ``x`` to the nearest linearised boundary: of length -gap / |w|*, along the norm's steepest way up w."""
        threat = problem.threat
        nearest, step = torch.full_like(x.flatten(1)[:, 0], torch.inf), torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            gaps = self._gaps(problem.goal, problem.logits(x)).unbind(1)
        for gap in gaps:
            (w,) = torch.autograd.grad(gap, x, torch.ones_like(gap), retain_graph=gap is not gaps[-1])
            w = w.masked_fill(((x <= threat.lower) & (w < 0)) | ((x >= threat.upper) & (w > 0)), 0)
            way = threat.norm.steepest(w)
            length = -gap.detach() / (way * w).flatten(1).sum(1)
            nearer = length < nearest
            nearest = torch.where(nearer, length, nearest)
            step = torch.where(by_row(nearer, x), way * by_row(length + FURTHER, x), step)
        return step

    def _gaps(self, goal: Goal, logits: Tensor) -> Tensor:
        """How far above the label each rival is, (B, K): all below 0 until the goal is met."""
        if goal.targeted:
            return goal.margin(logits).unsqueeze(1)
        label = goal.labels.unsqueeze(1)
        rivals = logits.scatter(1, label, -torch.inf).topk(min(self.candidates, logits.shape[1] - 1)).values
        return rivals - logits.gather(1, label)
