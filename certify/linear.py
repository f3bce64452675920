"""Certificates by interval and linear bounds on a network, from the cheapest to the tightest."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.ascent import ascend, customary_length
from robustbench_lite.bounds import Ball, Bounds, Graph, Unbounded, differences, optimised, trace
from robustbench_lite.certificate import FALSIFIED, SOUND, Certificate
from robustbench_lite.defended import Defended, ask_finally
from robustbench_lite.noise import Noise
from robustbench_lite.papers import GOWAL_2018, WONG_2018, ZHANG_2020
from robustbench_lite.problem import Problem
from robustbench_lite.registry import certifier
from robustbench_lite.threat import Goal, ThreatModel

NORMS = frozenset({"linf", "l2", "l1"})
BATCH = 25  # inputs whose layers are bounded at once: memory grows with it, and above it speed does not
MANY = 100  # for intervals, which take little memory: twice as fast as 25
STEPS = 20  # of the search for a counterexample, which costs less than one linear bound

Method = Callable[[Graph, Ball, Tensor], Tensor]  # lower bounds (B, S) on linear functions (B, S, C) of the logits


def certificate(
    model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, *methods: Method, batch: int = BATCH
) -> Certificate:
    """What is proved when each method is asked about the inputs that those before it leave open.

    A margin is the best that any method says of it. Inputs that are as far from proved share a batch, so that a method
    which works on one until all of it is proved can stop.
    """
    graph = network(model, tuple(x.shape[1:]))
    (classes,) = graph.output.shape
    functions = differences(y, classes).to(x)
    bounds = x.new_full(functions.shape[:2], -torch.inf)
    with torch.no_grad():
        for method in methods:
            margin, order = bounds.amin(1).sort(descending=True, stable=True)
            for rows in order[margin <= SOUND[bounds.dtype]].split(batch):
                found = method(graph, Ball(x[rows], threat), functions[rows])
                bounds[rows] = torch.maximum(bounds[rows], found)
    return Certificate.of_margins(bounds.amin(1), y, threat.eps)


def network(model: Defended, shape: tuple[int, ...]) -> Graph:
    """The graph of a model behind its defense.

    Raises:
        Unbounded: names the layer that cannot be bounded, or the wrapper that shows attacks a stand-in.
    """
    for module in model.modules():
        if isinstance(module, Defended) and type(module).surrogate is not Defended.surrogate:
            raise Unbounded(f"{type(module).__name__} has a surrogate, so bounds do not cover it")
    return trace(model, shape)


def interval(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    return Bounds(graph, ball, slopes=None).lower(functions)


def through_intervals(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    """Adaptive slopes from the intervals of the layers, which are the bounds where they are better."""
    bounds = Bounds(graph, ball, refine=False)
    return torch.maximum(bounds.lower(functions), _plain(bounds, functions))


def linear(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    """The best of adaptive slopes, zero slopes and no lines at all, all from bounds that adaptive slopes give."""
    bounds = Bounds(graph, ball)
    zero = Bounds(graph, ball, "zero", refine=False, within=bounds.intervals)
    best = torch.maximum(bounds.lower(functions), zero.lower(functions))
    return torch.maximum(best, _plain(bounds, functions))


def _plain(bounds: Bounds, functions: Tensor) -> Tensor:
    """Interval bounds on the functions, from the bounds on the layers."""
    return Bounds(bounds.graph, bounds.ball, None, within=bounds.intervals).lower(functions)


@certifier("ibp")
@dataclass(frozen=True)
class IBP:
    """Interval bound propagation, layer by layer (Gowal et al., 2018, equation 6; the last layer with the margins)."""

    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = GOWAL_2018

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        return certificate(model, x, y, threat, interval, batch=MANY)


@certifier("crown-ibp")
@dataclass(frozen=True)
class CrownIBP:
    """One linear relaxation of the network, between the intervals of its layers (Zhang et al., 2020, section 3.2)."""

    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = ZHANG_2020

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        return certificate(model, x, y, threat, through_intervals)


@certifier("crown")
@dataclass(frozen=True)
class Crown:
    """Linear relaxation of the network, layer by layer (Zhang et al., 2018, theorem 3.2).

    The lower slopes of ReLUs are adaptive; the logits are bounded with zero slopes and by intervals too, which are
    better on networks that were trained for intervals.
    """

    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = """@inproceedings{zhang2018efficient,
  title     = {Efficient Neural Network Robustness Certification with General Activation Functions},
  author    = {Huan Zhang and Tsui-Wei Weng and Pin-Yu Chen and Cho-Jui Hsieh and Luca Daniel},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2018}
}"""

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        return certificate(model, x, y, threat, linear)


@certifier("wong-kolter")
@dataclass(frozen=True)
class WongKolter:
    """The dual network, a linear relaxation with parallel slopes (Wong & Kolter, 2018, algorithm 1).

    Without ``clip`` the ball is not cut to the pixel range, as in the paper. The random projections of the second paper
    (Wong et al., 2018, section 3.2) estimate bounds and prove nothing; they are for training, in ``bounds.estimated``.
    """

    clip: bool = True

    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = WONG_2018

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        if not self.clip:
            threat = replace(threat, lower=-math.inf, upper=math.inf)
        return certificate(model, x, y, threat, dual)


def dual(graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
    return Bounds(graph, ball, "parallel").lower(functions)


@certifier("alpha-crown")
@dataclass(frozen=True)
class AlphaCrown:
    """Linear relaxation with optimised lower slopes, in intermediate bounds too (Xu et al., 2021, section 3.1).

    Only the inputs that CROWN leaves open get ``iterations`` steps of Adam, at first of size ``rate``.
    """

    iterations: int = 12
    rate: float = 0.2

    version: ClassVar[int] = 2
    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = """@inproceedings{xu2021fast,
  title     = {Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
               Verifiers},
  author    = {Kaidi Xu and Huan Zhang and Shiqi Wang and Yihan Wang and Suman Jana and Xue Lin and Cho-Jui Hsieh},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}"""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be 1 or more, not {self.iterations}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, not {self.rate:g}")

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        return certificate(model, x, y, threat, linear, self.learned)

    def learned(self, graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
        return optimised(graph, ball, functions, self.iterations, self.rate, enough=SOUND[functions.dtype])


@certifier("best")
@dataclass(frozen=True)
class Best:
    """IBP, CROWN-IBP, CROWN and alpha-CROWN in turn, each for the inputs that those before it leave open.

    Before the two that take long, PGD looks for counterexamples: of what it fools, nothing can be proved.
    """

    iterations: int = 12

    version: ClassVar[int] = 2
    norms: ClassVar[frozenset[str]] = NORMS

    def __post_init__(self) -> None:
        AlphaCrown(self.iterations)

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        margin = certificate(model, x, y, threat, interval, through_intervals).margin
        open, points, fooled = margin <= SOUND[margin.dtype], x.clone(), torch.zeros_like(y, dtype=torch.bool)
        if open.any():
            points[open], fooled[open] = descended(model, x[open], y[open], threat, noise[open])
        left = open & ~fooled
        if left.any():
            slow = certificate(model, x[left], y[left], threat, linear, AlphaCrown(self.iterations).learned)
            margin[left] = torch.maximum(margin[left], slow.margin)
        said = Certificate.of_margins(margin, y, threat.eps)
        status = [FALSIFIED if one else proved for one, proved in zip(fooled.tolist(), said.status)]
        return replace(said, status=status, counterexample=points)


def descended(model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> tuple[Tensor, Tensor]:
    """What PGD finds in the balls around inputs, and which of these points the model gets wrong beyond doubt."""
    (classes,) = network(model, tuple(x.shape[1:])).output.shape
    goal = Goal(y)
    problem = Problem(model, x, goal, threat, noise, classes=classes)
    length = customary_length(threat.eps, STEPS)
    ascend(lambda at: problem.gradient(at, Goal.margin)[0], x, x, threat, STEPS, length)
    points = threat.project_strictly(problem.best, x)
    return points, goal.margin(ask_finally(model, points, len(x), noise)) > SOUND[x.dtype]
