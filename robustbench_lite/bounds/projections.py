"""Estimates of the dual network's bounds by random projections (Wong, Schmidt, Metzen & Kolter, 2018, section 3.2)."""

import torch
from torch import Tensor

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Affine, Graph, Unbounded
from robustbench_lite.bounds.linear import Bounds
from robustbench_lite.bounds.relax import Interval, Rectifier
from robustbench_lite.noise import Noise


def estimated(graph: Graph, ball: Ball, noise: Noise, projections: int = 50) -> Bounds:
    """The dual network with layers whose bounds are estimated, at a cost that is linear in their neurons: for training.

    With parallel slopes a neuron is a centre plus a linear function of independent shares, of the ball's and of every
    relaxed neuron's before it; how far it reaches is the l1 norm of the coefficients. For coefficients times as many
    Cauchy variables are again Cauchy, of that norm as scale, the median of some absolute values estimates it.

    An estimate falls short about as often as not, and there are as many as neurons: nothing that rests on them is
    proved. The functions that :meth:`Bounds.lower` is then asked for are themselves carried back exactly.

    Raises:
        ValueError: for a ball that is not linf, or an activation other than (leaky) ReLU.
    """
    if not ball.is_box:
        raise ValueError(f"projections estimate bounds under linf, not under {ball.threat.norm.name}")
    lower, upper = ball.box
    centres, shares = [(lower + upper) / 2], [_cauchy(noise.at("input"), (upper - lower) / 2, projections)]
    intervals = [ball.box]
    for node in graph.nodes[1:]:
        inside = [parent.index for parent in node.parents]
        if isinstance(node.op, Affine):
            centre = node(*(centres[index] for index in inside))
            parts = [map(shares[index].flatten(0, 1)) for map, index in zip(node.op.maps, inside)]
            share = sum(parts[1:], parts[0]).unflatten(0, (-1, projections))
            reach = share.abs().median(1).values
            intervals.append(Interval(centre - reach, centre + reach))
        else:
            if not isinstance(node.op, Rectifier):
                raise Unbounded(f"{node.layer} is not a ReLU, for which alone projections estimate bounds")
            (before,) = inside
            lines = node.op.lines(intervals[before], "parallel")
            half = lines.upper_offset / 2
            centre = lines.lower * centres[before] + half
            share = lines.lower.unsqueeze(1) * shares[before] + _cauchy(noise.at(node.index), half, projections)
            intervals.append(node.op.interval(intervals[before]))
        centres.append(centre)
        shares.append(share)
    return Bounds(graph, ball, "parallel", refine=False, within=intervals)


def _cauchy(noise: Noise, scale: Tensor, count: int) -> Tensor:
    """Cauchy variables of ``scale`` (B, ...): (B, count, ...)."""
    uniform = noise.uniform(scale.new_empty(len(scale), count, *scale.shape[1:]))
    return scale.unsqueeze(1) * torch.tan(torch.pi * (uniform - 0.5))
