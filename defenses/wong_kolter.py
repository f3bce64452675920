"""Training on the dual network."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.bounds import Ball, Bounds, Graph, estimated
from robustbench_lite.noise import Noise
from robustbench_lite.papers import WONG_2018
from robustbench_lite.registry import defense

from ._certified import WarmRecipe


@defense("wong-kolter")
@dataclass(frozen=True)
class WongKolter(WarmRecipe):
    """The worst cross-entropy that the dual network allows (Wong & Kolter, 2018, section 3).

    ``warm_start`` begins with the weights that ``ibp`` gives at the same eps: few ``epochs`` and no ``warmup`` are
    enough then, few neurons are left open, and exact bounds on the layers cost less than to estimate them by random
    ``projections`` (Wong et al., 2018, section 3.2; for linf), which pay where training starts from nothing. While it
    trains, robust accuracy is what the exact dual network proves.
    """

    epochs: int = 2
    warmup: int = 0
    kappa: float = 0.0
    projections: int = 0  # none: exact

    bibtex: ClassVar[str] = WONG_2018

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projections < 0:
            raise ValueError(f"projections must be 0 or more, not {self.projections}")
        if self.projections and self.norm != "linf":
            raise ValueError(f"projections estimate bounds under linf; write projections=0 for {self.norm}")

    def proved(self, graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
        return Bounds(graph, ball, "parallel").lower(functions)

    def margins(self, graph: Graph, ball: Ball, functions: Tensor, noise: Noise, epoch: float) -> Tensor:
        if not self.projections:
            return self.proved(graph, ball, functions)
        return estimated(graph, ball, noise.at("projections"), self.projections).lower(functions)
