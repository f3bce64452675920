"""The fast gradient sign method after a random step."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.papers import TRAMER_2018
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack


@attack("r-fgsm")
@dataclass(frozen=True)
class RFGSM:
    """A random step, then one along the gradient (Tramer et al., 2018, section 3.4: R+FGSM).

    The random step takes ``share`` of eps, the gradient step the rest: x' = x + alpha sign(N(0, I)), then
    x' + (eps - alpha) sign(gradient). Under l2 and l1 both are that norm's steepest step instead of a sign.
    """

    share: float = 0.5

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    bibtex: ClassVar[str] = TRAMER_2018

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be 0 or more and below 1, not {self.share:g}")

    def __call__(self, problem: Problem) -> Tensor:
        threat, clean = problem.threat, problem.x
        alpha = self.share * threat.eps
        x = threat.step(clean, clean, problem.noise.normal(clean), alpha)
        gradient, _ = problem.gradient(x)
        return threat.step(x, clean, gradient, threat.eps - alpha)
