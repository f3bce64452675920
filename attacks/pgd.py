"""Projected gradient descent."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from robustbench_lite.ascent import ascend, customary_length
from robustbench_lite.papers import MADRY_2018
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import Goal

LOSSES = {"ce": Goal.cross_entropy, "margin": Goal.margin}


@attack("pgd")
@dataclass(frozen=True)
class PGD:
    """Steepest ascent from random starts, projected after every step (Madry et al., 2018, section 2.1).

    A step has ``length`` in units of eps's norm, by default 2.5 eps / steps.
    """

    steps: int = 40
    length: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: Literal["ce", "margin"] = "ce"

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    bibtex: ClassVar[str] = MADRY_2018

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError("steps and restarts must be 1 or more")
        if self.length is not None and not self.length > 0:
            raise ValueError(f"length must be above 0, not {self.length:g}")

    def __call__(self, problem: Problem) -> Tensor:
        threat, x = problem.threat, problem.x
        length = self.length if self.length is not None else customary_length(threat.eps, self.steps)
        for restart in range(self.restarts):
            noise = problem.noise.at("restart", restart)
            start = threat.sample(noise, problem.x) if self.random_start else problem.x
            x = ascend(
                lambda x: problem.gradient(x, LOSSES[self.loss])[0], start, problem.x, threat, self.steps, length
            )
            problem.labels(x)
        return x
