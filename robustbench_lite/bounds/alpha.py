"""Linear relaxation with optimised lower slopes (alpha-CROWN; Xu et al., 2021)."""

import torch
from torch import Tensor

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Graph
from robustbench_lite.bounds.linear import Bounds, Free

DECAY = 0.98  # of the rate after every iteration


def optimised(graph: Graph, ball: Ball, functions: Tensor, iterations: int = 20, rate: float = 0.1) -> Tensor:
    """Lower bounds (B, S) on linear functions (B, S, ...) of the output: the best seen while Adam raises their sum.

    Every bounded function has lower slopes of its own, those of intermediate bounds included. Begins at adaptive
    slopes, and is never looser than they are. Not differentiable.
    """
    with torch.no_grad():
        begin = Bounds(graph, ball)
        best = begin.lower(functions)
    free: Free = {}
    optimiser: torch.optim.Adam | None = None
    for iteration in range(iterations):
        with torch.enable_grad():
            found = Bounds(graph, ball, free=free, within=begin.intervals).lower(functions)
        best = torch.maximum(best, found.detach())
        slopes = list(free.values())
        if optimiser is None:
            optimiser = torch.optim.Adam(slopes, rate)
        for group in optimiser.param_groups:
            group["lr"] = rate * DECAY**iteration
        gradients = torch.autograd.grad(-found.sum(), slopes, allow_unused=True)
        for slope, gradient in zip(slopes, gradients):
            slope.grad = gradient
        optimiser.step()
        with torch.no_grad():
            for slope in slopes:
                slope.clamp_(0, 1)
    return best
