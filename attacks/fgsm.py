"""The fast gradient sign method."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.papers import GOODFELLOW_2015
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack


@attack("fgsm")
@dataclass(frozen=True)
class FGSM:
    """One step of length eps from the clean input (Goodfellow et al., 2015)."""

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    bibtex: ClassVar[str] = GOODFELLOW_2015

    def __call__(self, problem: Problem) -> Tensor:
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)
