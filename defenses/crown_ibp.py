"""Training on linear bounds between intervals."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.bounds import Ball, Bounds, Graph
from robustbench_lite.noise import Noise
from robustbench_lite.papers import ZHANG_2020
from robustbench_lite.registry import defense

from .ibp import IBP


@defense("crown-ibp")
@dataclass(frozen=True)
class CrownIBP(IBP):
    """Like ``ibp``, on a mixture of interval bounds and of one linear relaxation (Zhang et al., 2020, section 3.2).

    Over the ``warmup`` the share of the linear bounds, which cost more and are tighter while weights are young, falls
    from 1 to ``beta``.
    """

    epochs: int = 50
    warmup: int = 10  # a step of it takes eight times what a later one takes
    kappa: float = 0.25
    beta: float = 0.0

    bibtex: ClassVar[str] = ZHANG_2020

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], not {self.beta:g}")

    def margins(self, graph: Graph, ball: Ball, functions: Tensor, noise: Noise, grown: float) -> Tensor:
        share, intervals = 1 - (1 - self.beta) * grown, super().proved(graph, ball, functions)
        if not share:
            return intervals
        return share * linear(graph, ball, functions) + (1 - share) * intervals

    def proved(self, graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
        return torch.maximum(super().proved(graph, ball, functions), linear(graph, ball, functions))


def linear(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    return Bounds(graph, ball, refine=False).lower(functions)
