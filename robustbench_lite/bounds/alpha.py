"""Linear relaxation with optimised lower slopes (alpha-CROWN; Xu et al., 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Graph
from robustbench_lite.bounds.linear import Bounds, Free
from robustbench_lite.bounds.relax import Interval

DECAY = 0.95  # of the rate after every iteration


def optimised(
    graph: Graph,
    ball: Ball,
    functions: Tensor,
    iterations: int = 12,
    rate: float = 0.2,
    batch: int = 8,
    enough: float | None = None,
) -> Tensor:
    """Lower bounds (B, S) on linear functions (B, S, ...) of the output: the best seen while Adam raises their sum.

    Every bounded function has lower slopes of its own, those of intermediate bounds included. They begin as adaptive
    slopes, whose bounds are never undercut. ``batch`` inputs are worked on at once. Not differentiable.

    If it is known what is ``enough``, an input is left once all of its bounds lie above, and given up once half of the
    iterations are over and the pace of the last one, kept up, would not bring them there.
    """
    pieces = zip(ball.x.split(batch), functions.split(batch))
    return torch.cat([_best(graph, Ball(x, ball.threat), part, iterations, rate, enough) for x, part in pieces])


def _best(graph: Graph, ball: Ball, functions: Tensor, iterations: int, rate: float, enough: float | None) -> Tensor:
    with torch.no_grad():
        bounds = Bounds(graph, ball)
        best = bounds.lower(functions)
    free, moments = Free(), list[tuple[Tensor, Tensor]]()
    done = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    for iteration in range(iterations):
        within = [Interval(lower.detach(), upper.detach()) for lower, upper in bounds.intervals]
        with torch.enable_grad():
            bounds = Bounds(graph, ball, free=free, within=within)
            found = bounds.lower(functions)
        before, best = best.amin(1), torch.where(done.unsqueeze(1), best, torch.maximum(best, found.detach()))
        if enough is not None:
            least = best.amin(1)
            at_this_pace = least + (least - before) * (iterations - 1 - iteration)
            done |= (least > enough) | (2 * iteration >= iterations) & (at_this_pace <= enough)
        if done.all():
            break
        shares = list(free.shares.values())
        if not shares:
            break
        moments = moments or [(torch.zeros_like(share), torch.zeros_like(share)) for share in shares]
        gradients = torch.autograd.grad(found, shares, torch.ones_like(found), materialize_grads=True)
        _ascend(shares, gradients, moments, rate * DECAY**iteration, iteration + 1)
    return best


@torch.no_grad()
def _ascend(
    shares: list[Tensor], gradients: Sequence[Tensor], moments: list[tuple[Tensor, Tensor]], rate: float, count: int
) -> None:
    """A step of Adam (Kingma & Ba, 2015, algorithm 1); torch's own takes 160 MB and seconds to import a compiler."""
    for share, gradient, (first, second) in zip(shares, gradients, moments):
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        scale = (second / (1 - 0.999**count)).sqrt_().add_(1e-8)
        share.addcdiv_(first, scale, value=rate / (1 - 0.9**count)).clamp_(0, 1)
