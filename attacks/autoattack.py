"""AutoAttack: four attacks that need no tuning, one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack

from .apgd import APGD
from .fab import FAB
from .square import Square

Stage = Callable[[Problem], Tensor]


@attack("autoattack")
@dataclass(frozen=True)
class AutoAttack:
    """The standard version (Croce & Hein, 2020, section 4): apgd on the cross-entropy, targeted apgd, targeted fab and
    square; each sees only the inputs that survived those before it.

    ``steps`` are those of apgd and fab, towards each of ``targets`` classes where they are targeted; ``queries`` are
    square's.
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    version: ClassVar[int] = 2
    bibtex: ClassVar[str] = APGD.bibtex

    def __post_init__(self) -> None:
        if self.steps < 1 or self.targets < 1 or self.queries < 1:
            raise ValueError("steps, targets and queries must be 1 or more")

    @property
    def attacks(self) -> list[Stage]:
        return [
            APGD(self.steps),
            APGD(self.steps, loss="dlr-t", targets=self.targets),
            FAB(self.steps, targets=self.targets),
            Square(self.queries),
        ]

    def __call__(self, problem: Problem) -> Tensor:
        return cascade(self.attacks, problem)


def cascade(attacks: Sequence[Stage], problem: Problem) -> Tensor:
    """Hands each attack what is still open, and keeps what the last one proposed."""
    found = problem.x.clone()
    for stage in attacks:
        working = problem.open
        if not working.any():
            break
        part = problem[working]
        found[working] = part.threat.project(stage(part), part.x)
    return found
