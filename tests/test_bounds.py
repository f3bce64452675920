"""The engine of bounds: never wrong, exact where it can be, and as tight as others."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustbench_lite.bounds import Ball, Bounds, Graph, Unbounded, differences, optimised, trace
from robustbench_lite.bounds.graph import RULES, rule
from robustbench_lite.bounds.maps import Convolution, Full, Terms
from robustbench_lite.bounds.relax import GELU, SIGMOID, SILU, TANH, Interval, Rectifier, Smooth
from robustbench_lite.data import Images
from robustbench_lite.models import MODELS, Adapted, build
from robustbench_lite.norms import NORMS
from robustbench_lite.threat import ThreatModel

METHODS: dict[str, dict] = {
    "ibp": {"slopes": None},
    "crown-ibp": {"refine": False},
    "crown": {},
    "zero": {"slopes": "zero"},
    "parallel": {"slopes": "parallel"},
}
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
}
SHAPE = (2, 6, 5)
FREE = (-math.inf, math.inf)


class Residual(nn.Module):
    """Two paths of different reach that are added, two that are joined, and one that is subtracted."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(2), activation
        self.first, self.second = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1, groups=2)
        self.shortcut = nn.Conv2d(2, 4, 1, 2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.activation(self.norm(x))
        y = self.shortcut(pre) + self.second(self.activation(self.first(pre)))
        y = torch.cat([self.activation(y), 1 - y / 2], 1)
        return self.last(F.adaptive_avg_pool2d(y, 1).flatten(1)) - 0.1


def dense(activation: nn.Module) -> nn.Module:
    layers = [nn.Linear(60, 7), activation, nn.Linear(7, 6), activation, nn.Linear(6, 3)]
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional(activation: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, (2, 1), (1, 0)), activation, nn.Conv2d(3, 4, 2, dilation=2, padding=1), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, activation, nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(12, 3))


def pooled(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, 1), activation, nn.Flatten(), nn.Linear(18, 3))


STRUCTURES = {"dense": dense, "convolutional": convolutional, "pooled": pooled, "residual": Residual}


def network(structure: str, activation: str = "relu", seed: int = 0) -> nn.Module:
    """A random network in float64, with weights that leave many activations unsettled."""
    random = torch.Generator().manual_seed(seed)
    model = STRUCTURES[structure](ACTIVATIONS[activation]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.6 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * scale)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=random)
                module.running_var.uniform_(0.5, 2, generator=random)
    return model


def inputs(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Images of which a quarter of the pixels lie on the edge of the range."""
    random = torch.Generator().manual_seed(seed)
    return (1.5 * torch.rand(count, *shape, generator=random, dtype=torch.float64) - 0.25).clamp(0, 1)


def threat(norm: str = "linf", eps: float = 0.1, within: tuple[float, float] = (0.0, 1.0)) -> ThreatModel:
    return ThreatModel(NORMS[norm], eps, *within)


def points(ball: Ball, count: int, model: nn.Module, seed: int) -> Tensor:
    """Points of the ball (count, B, ...): random ones, corners, and some that climb or descend a logit."""
    random = torch.Generator().manual_seed(seed)
    many = ball.x.expand(count, *ball.x.shape).flatten(0, 1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(many) * torch.randn(len(many), 3, generator=random).double()).sum(), many)
    way = torch.randn(many.shape, generator=random, dtype=many.dtype)
    way[::3] = ball.threat.norm.steepest(gradient[::3])
    way[1::3] = way[1::3].sign()
    length = ball.threat.eps * (1 + 9 * torch.rand(len(many), *[1] * (many.dim() - 1), generator=random))
    clean = many.detach()
    return ball.threat.project(clean + way * length, clean).view(count, *ball.x.shape)


def values(graph: Graph, x: Tensor) -> list[Tensor]:
    """What every node computes."""
    found: list[Tensor] = []
    for node in graph.nodes:
        found.append(node(*(found[parent.index] for parent in node.parents)) if node.op else x)
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(STRUCTURES)),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from(["linf", "l2", "l1"]),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_no_point_of_the_ball_leaves_a_bound(structure, activation, norm, size, seed):
    model, x = network(structure, activation, seed), inputs(2, seed)
    ball = Ball(x, threat(norm, size * {"linf": 0.5, "l2": 1.5, "l1": 5}[norm], (0.0, 1.0) if seed % 4 else FREE))
    graph, functions = trace(model, SHAPE), differences(torch.tensor([seed % 3, 1]), 3)
    tried = points(ball, 250, model, seed)
    assert ball.threat.allows(tried.flatten(0, 1), x.repeat(250, 1, 1, 1), 1e-9).all()
    with torch.no_grad():
        reached = [value.view(250, 2, *node.shape) for value, node in zip(values(graph, tried.flatten(0, 1)), graph.nodes)]
        margins = torch.einsum("bsc,kbc->kbs", functions.double(), reached[-1]).amin(0)
        for name, options in METHODS.items():
            bounds = Bounds(graph, ball, **options)
            assert (bounds.lower(functions) <= margins + 1e-9).all(), name
            for node, (lower, upper) in zip(graph.nodes, bounds.intervals):
                assert (reached[node.index] >= lower - 1e-9).all(), (name, node)
                assert (reached[node.index] <= upper + 1e-9).all(), (name, node)
    assert (optimised(graph, ball, functions, iterations=3) <= margins + 1e-9).all()
