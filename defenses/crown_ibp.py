"""Training on linear bounds between intervals."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.bounds import Ball, Bounds, Graph
from robustbench_lite.noise import Noise
from robustbench_lite.papers import ZHANG_2020
from robustbench_lite.registry import defense

from ._certified import WarmRecipe
from .ibp import intervals


@defense("crown-ibp")
@dataclass(frozen=True)
class CrownIBP(WarmRecipe):
    """Like ``ibp``, on a mixture of interval bounds and of one linear relaxation (Zhang et al., 2020, section 3.2).

    Over the first ``warmup`` epochs the share of the linear bounds, which cost more, falls from 1 to ``beta``. Unless
    it begins with the weights of ``ibp``, the ball grows meanwhile, as it does there.
    """

    epochs: int = 20
    warmup: int = 2  # a step of it takes eight times what a later one takes
    rate: float = 5e-4
    stretch: float = 1.15
    kappa: float = 0.1
    beta: float = 0.0

    bibtex: ClassVar[str] = ZHANG_2020

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], not {self.beta:g}")

    def grown(self, epoch: float) -> float:
        return 1.0 if self.warm_start else super().grown(epoch)

    def margins(self, graph: Graph, ball: Ball, functions: Tensor, noise: Noise, epoch: float) -> Tensor:
        share, narrow = 1 - (1 - self.beta) * super().grown(epoch), intervals(graph, ball, functions)
        return share * linear(graph, ball, functions) + (1 - share) * narrow if share else narrow

    def proved(self, graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
        return torch.maximum(intervals(graph, ball, functions), linear(graph, ball, functions))


def linear(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    return Bounds(graph, ball, refine=False).lower(functions)
