"""Transfer: what fools another model may fool this one."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import by_row
from robustbench_lite.plugins import Attack, learns
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack

from .pgd import PGD


@attack("transfer")
@dataclass(frozen=True)
class Transfer:
    """An attack on another model, whose result is shown to this one (Papernot et al., 2016; Tramer et al., 2018).

    ``source`` is a defense, of another architecture after an ``@`` (``madry@mlp``); ``attack`` sees of it what it needs
    to, and goes on after a hit, since what barely fools the source fools little else. Queries count only where the
    attacked model is asked, and it is asked nothing: forwards and backwards are 0.
    """

    source: str = "standard"
    attack: Attack = field(default_factory=PGD)

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = PGD.norms  # and of one made, those of its attack
    minimises: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@article{papernot2016transferability,
  title   = {Transferability in Machine Learning: from Phenomena to Black-Box Attacks using Adversarial Samples},
  author  = {Nicolas Papernot and Patrick McDaniel and Ian Goodfellow},
  journal = {arXiv preprint arXiv:1605.07277},
  year    = {2016}
}"""

    def __post_init__(self) -> None:
        if learns(self.attack) or isinstance(self.attack, Transfer):
            raise ValueError(f"an attack on the source is wanted that needs nothing else, not {self.attack.name}")
        object.__setattr__(self, "norms", self.attack.norms)
        object.__setattr__(self, "minimises", getattr(self.attack, "minimises", False))

    def __call__(self, problem: Problem) -> Tensor:
        source = problem.on(self.source, self.attack.access)
        found = self.attack(source)
        for reason in {*source.reasons} - {""}:
            problem.give_up(torch.tensor([given == reason for given in source.reasons]).to(found.device), reason)
        sound = problem.threat.allows(found, problem.x) & problem.goal.reached(source.labels(found))
        near = source.distance.isfinite() & (source.distance <= problem.threat.reach(problem.x))
        return torch.where(by_row(near & ~sound, found), source.best, found)
