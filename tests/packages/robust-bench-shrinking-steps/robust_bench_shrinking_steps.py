"""An attack for robustbench-lite: steepest ascent in steps that shrink. Put your own idea in its place."""

from dataclasses import dataclass
from typing import ClassVar

from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from torch import Tensor


@attack("shrinking-steps")
@dataclass(frozen=True)
class ShrinkingStepsAttack:
    """Steepest ascent from a random point, in steps that shrink from 2 eps to 2 eps / steps.

    Fields are settings (`shrinking-steps:steps=40`). Your paper goes here: authors, year, the equation.
    """

    steps: int = 10

    access: ClassVar[Access] = "gradients"  # what it sees of the model; also: scores, labels
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    bibtex: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")

    def __call__(self, problem: Problem) -> Tensor:
        threat, clean = problem.threat, problem.x
        x = threat.sample(problem.noise.at("start"), clean)  # the only source of chance
        for step in range(self.steps):
            gradient, _ = problem.gradient(x)  # of a loss that grows towards the goal
            x = threat.step(x, clean, gradient, 2 * threat.eps * (1 - step / self.steps))
        problem.labels(x)  # what is never asked about is never found
        return x
