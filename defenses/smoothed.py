"""Randomized smoothing."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustbench_lite.defended import Defended
from robustbench_lite.papers import COHEN_2019
from robustbench_lite.registry import defense
from robustbench_lite.smoothed import Smoothed
from robustbench_lite.training import Lab


@defense("smoothed")
@dataclass(frozen=True)
class Smoothing:
    """Answers by what the model says most often under Gaussian noise (Cohen, Rosenfeld & Kolter, 2019, section 3).

    Noise has deviation ``sigma``; so many ``draws`` of it vote, and attacks that follow gradients average over as many.
    The certifier ``smoothing`` takes many more.
    """

    sigma: float = 0.25
    draws: int = 16

    trains: ClassVar[bool] = False
    bibtex: ClassVar[str] = COHEN_2019

    def __post_init__(self) -> None:
        if not self.sigma > 0 or self.draws < 1:
            raise ValueError(f"sigma must be above 0 and draws 1 or more, not {self.sigma:g} and {self.draws}")

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        return Smoothed(model, self.sigma, self.draws).eval()
