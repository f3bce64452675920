"""Training on interval bounds."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.bounds import Ball, Bounds, Graph
from robustbench_lite.papers import GOWAL_2018
from robustbench_lite.registry import defense

from ._certified import CertifiedRecipe


@defense("ibp")
@dataclass(frozen=True)
class IBP(CertifiedRecipe):
    """Cross-entropy of clean logits and of the worst that interval bounds allow (Gowal et al., 2018, section 3).

    Over the first ``warmup`` epochs the box grows from a point to ``stretch`` times ``eps``, and the share of clean
    cross-entropy falls from 1 to ``kappa``. While it trains, robust accuracy is what intervals prove at ``eps``.
    """

    epochs: int = 60
    warmup: int = 28
    stretch: float = 4 / 3

    bibtex: ClassVar[str] = GOWAL_2018

    def proved(self, graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
        return intervals(graph, ball, functions)


def intervals(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    return Bounds(graph, ball, slopes=None).lower(functions)
