"""The fast gradient sign method."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack


@attack("fgsm")
@dataclass(frozen=True)
class FGSM:
    """One step of length eps from the clean input (Goodfellow et al., 2015)."""

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    bibtex: ClassVar[str] = """@inproceedings{goodfellow2015explaining,
  title     = {Explaining and Harnessing Adversarial Examples},
  author    = {Ian J. Goodfellow and Jonathon Shlens and Christian Szegedy},
  booktitle = {International Conference on Learning Representations},
  year      = {2015}
}"""

    def __call__(self, problem: Problem) -> Tensor:
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)
