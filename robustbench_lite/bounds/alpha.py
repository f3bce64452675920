"""Linear relaxation with optimised lower slopes (alpha-CROWN; Xu et al., 2021)."""

import torch
from torch import Tensor

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Graph
from robustbench_lite.bounds.linear import Bounds, Free
from robustbench_lite.bounds.relax import Interval

DECAY = 0.98  # of the rate after every iteration


def optimised(
    graph: Graph, ball: Ball, functions: Tensor, iterations: int = 20, rate: float = 0.1, batch: int = 8
) -> Tensor:
    """Lower bounds (B, S) on linear functions (B, S, ...) of the output: the best seen while Adam raises their sum.

    Every bounded function has lower slopes of its own, those of intermediate bounds included. They begin as adaptive
    slopes, whose bounds are never undercut. ``batch`` inputs are worked on at once; not differentiable.
    """
    pieces = zip(ball.x.split(batch), functions.split(batch))
    return torch.cat([_best(graph, Ball(x, ball.threat), part, iterations, rate) for x, part in pieces])


def _best(graph: Graph, ball: Ball, functions: Tensor, iterations: int, rate: float) -> Tensor:
    with torch.no_grad():
        bounds = Bounds(graph, ball)
        best = bounds.lower(functions)
    free, optimiser = Free(), None
    for iteration in range(iterations):
        within = [Interval(lower.detach(), upper.detach()) for lower, upper in bounds.intervals]
        with torch.enable_grad():
            bounds = Bounds(graph, ball, free=free, within=within)
            found = bounds.lower(functions)
        best = torch.maximum(best, found.detach())
        shares = list(free.shares.values())
        if not shares:
            break
        optimiser = optimiser or torch.optim.Adam(shares, rate)
        optimiser.param_groups[0]["lr"] = rate * DECAY**iteration
        for share, gradient in zip(shares, torch.autograd.grad(-found.sum(), shares, allow_unused=True)):
            share.grad = gradient
        optimiser.step()
        with torch.no_grad():
            for share in shares:
                share.clamp_(0, 1)
    return best
