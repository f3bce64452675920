"""The attacks of Carlini & Wagner in the l-infinity norm: at a given eps, and for the nearest adversarial input."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import MOVED, by_row, linf
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import Goal

from .cw import CITATION, LARGEST, Adam, Descent


def excess(tau: Tensor, delta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """How far each perturbation exceeds tau (B,), summed over its coordinates, and the gradient of that."""
    over = (delta.abs() - by_row(tau[rows], delta)).clamp_min(0)
    return over.flatten(1).sum(1), delta.sign() * (over > 0)


@attack("cw-linf")
@dataclass(frozen=True)
class CWLinf:
    """Adam on the margin, projected after every step: the attack of Carlini & Wagner (2017) at a given eps.

    Their loss f6 without a distance, as it is used for robust accuracy since Madry et al. (2018). The first step has
    length ``rate`` in units of eps; steps shrink linearly to 0.
    """

    steps: int = 100
    rate: float = 0.5

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    bibtex: ClassVar[str] = CITATION

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, not {self.rate:g}")

    def __call__(self, problem: Problem) -> Tensor:
        threat, x = problem.threat, problem.x
        adam = Adam.at(x)
        for k in range(self.steps):
            gradient, _ = problem.gradient(x, Goal.margin)
            length = self.rate * threat.eps * (1 - k / self.steps)
            x = threat.project(x.add(adam.smooth(gradient), alpha=length), problem.x)
        return x


@attack("cw-linf-tau")
@dataclass(frozen=True)
class CWLinfTau:
    """The nearest input in l-infinity, by a bound that falls (Carlini & Wagner, 2017, section VI-C).

    Descents on sum(max(|delta| - tau, 0)) + c max(kappa - margin, 0), each from the last one's end. Where one reaches
    the goal within tau, tau becomes ``decay`` times what it needed; where not, c grows tenfold, at most to 10,000.
    ``rate`` is in units of tau. The paper's settings are steps=1000, initial_c=0.00001, and c doubles.
    """

    steps: int = 100
    rate: float = 0.2
    initial_c: float = 1.0
    kappa: float = 0.0
    abort: bool = True
    decay: float = 0.9

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimises: ClassVar[bool] = True
    bibtex: ClassVar[str] = CITATION

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if not self.rate > 0 or not self.initial_c > 0:
            raise ValueError("rate and initial_c must be above 0")
        if not self.kappa >= 0:
            raise ValueError(f"kappa must be 0 or more, not {self.kappa:g}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be between 0 and 1, not {self.decay:g}")

    def __call__(self, problem: Problem) -> Tensor:
        found, c = problem.x.clone(), torch.full_like(problem.distance, self.initial_c)
        tau, ever = torch.full_like(c, problem.threat.upper - problem.threat.lower), torch.zeros_like(problem.open)
        left = torch.arange(len(c), device=c.device)
        while len(left):
            bound = tau[left]
            descend = Descent(self.steps, self.kappa, self.abort, partial(excess, bound), enough=0)
            x, least = descend(problem[left], found[left], c[left], self.rate * bound)
            met = least == 0
            take = met | ~ever[left]
            found[left[take]], ever[left[met]] = x[take], True
            tau[left[met]] = self.decay * torch.minimum(bound[met], linf.size(x[met] - problem.x[left[met]]))
            c[left[~met]] *= 10
            left = left[(c[left] <= LARGEST) & (tau[left] > MOVED)]
        return found
