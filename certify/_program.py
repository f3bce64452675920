"""What a network answers over a ball of inputs, as a linear or a mixed-integer program."""

import math
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_lite.bounds import Ball, Bounds, Graph, Unbounded, trace
from robustbench_lite.bounds.graph import Affine, Node
from robustbench_lite.bounds.maps import Map
from robustbench_lite.bounds.relax import Interval, Nonlinear, Rectifier
from robustbench_lite.certificate import SOUND
from robustbench_lite.threat import ThreatModel
from robustbench_lite.wording import one_line

NORMS = frozenset({"linf", "l1"})  # an l2 ball is no polyhedron, and HiGHS solves no cone programs
MOST = 10_000  # neurons
BATCH = 256  # columns of a matrix that are worked out at once

# HiGHS forgives 1e-9 a row and column: SLACK is what a thousand of them with multipliers of 1 come to, as a share of
# bounds above 1. It is taken off every bound; that a margin must be above SURE leaves room for multipliers of 100, and
# for the network itself, which rounds to float32.
TOLERANCES = {f"{kind}_feasibility_tolerance": 1e-9 for kind in ("primal", "dual", "mip")}
SLACK = 1e-6
SURE = SOUND[torch.float32]


@dataclass(frozen=True)
class Network:
    """A network of affine layers and (leaky) ReLUs, in float64 on the CPU.

    Raises:
        Unbounded: names a layer of another kind, or says how many neurons are too many.
    """

    model: nn.Module
    graph: Graph

    @classmethod
    def of(cls, model: nn.Module, shape: torch.Size) -> "Network":
        exact = deepcopy(model).cpu().double()
        graph = trace(exact, tuple(shape))
        active = [node for node in graph.nodes if isinstance(node.op, Nonlinear)]
        for node in active:
            if not isinstance(node.op, Rectifier):
                raise Unbounded(f"{node.layer} is neither affine nor a (leaky) ReLU, all that lp and milp cover")
        neurons = sum(math.prod(node.shape) for node in active)
        if neurons > MOST:
            raise Unbounded(f"lp and milp are for small networks: this one has {neurons:,} neurons, more than {MOST:,}")
        return cls(exact, graph)

    @property
    def classes(self) -> int:
        return self.graph.output.shape[0]

    def bounds(self, x: Tensor, threat: ThreatModel) -> Bounds:
        """What CROWN says of all its neurons."""
        return Bounds(self.graph, Ball(x.cpu().double(), threat))

    @cached_property
    def matrices(self) -> dict[Node, list[Any]]:
        """The maps of each affine node, as sparse matrices."""
        return {
            node: [_matrix(map, parent) for map, parent in zip(node.op.maps, node.parents)]
            for node in self.graph.nodes
            if isinstance(node.op, Affine)
        }


def _matrix(map: Map, parent: Node) -> Any:
    from scipy.sparse import csr_array, vstack

    units = torch.eye(math.prod(parent.shape), dtype=torch.float64).split(BATCH)
    return vstack([csr_array(map(unit.view(-1, *parent.shape)).flatten(1).numpy()) for unit in units]).T.tocsr()


class Answer(NamedTuple):
    """What the solver says: ``bound`` counts only where it is ``optimal``; ``x`` is the flat input that it went for."""

    status: str
    bound: float = -math.inf
    x: Tensor | None = None

    @property
    def optimal(self) -> bool:
        return self.status == "optimal"


class Program:
    """The least of linear functions of ``neurons``, which are cvxpy's as ``x`` and ``limits`` are.

    What HiGHS minimises is the function less :data:`SURE`, so that the sign of its bounds decides.
    """

    def __init__(self, x: Any, neurons: Any, limits: list[Any]) -> None:
        import cvxpy

        self._x, self._function, excess = x, cvxpy.Parameter(neurons.size), cvxpy.Variable()
        self._problem = cvxpy.Problem(cvxpy.Minimize(excess), [*limits, excess == self._function @ neurons - SURE])

    def least(self, function: Tensor, **options: float) -> Answer:
        """A lower bound on the least of ``function``, one coefficient a neuron."""
        import cvxpy

        self._function.value = function.double().numpy()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that what a time limit cut short may be inaccurate
                self._problem.solve(solver=cvxpy.HIGHS, warm_start=False, **TOLERANCES, **options)
        except cvxpy.SolverError as error:
            return Answer(one_line(error))
        stats, value = self._problem.solver_stats.extra_stats, self._problem.value
        bound = SURE + (stats.mip_dual_bound if self._problem.is_mixed_integer() else value)
        x = None if self._x.value is None else torch.from_numpy(self._x.value)
        return Answer(self._problem.status, bound - SLACK * max(1, abs(bound)), x)


def over_ball(network: Network, bounds: Bounds, row: int, exact: bool = False, refine: bool = False) -> Program:
    """The program of the logits over the ball of one input: row ``row`` of the ball of ``bounds``.

    Each ReLU lies in the triangle that its bounds leave it (Ehlers, 2017), or, if ``exact``, on the ReLU itself, where
    a binary variable says on which side of zero (Tjeng, Xiao & Tedrake, 2019, section 4.1). To ``refine`` bounds is to
    solve the program of the layers so far for every neuron that they leave unsettled (Salman et al., 2019).
    """
    import cvxpy

    def flat(sides: Interval) -> Interval:
        return Interval(*(side[row].flatten() for side in sides))

    ball, values, limits = bounds.ball, list[Any](), list[Any]()
    for node in network.graph.nodes:
        before = [values[parent.index] for parent in node.parents]
        if node.op is None:
            x = cvxpy.Variable(math.prod(node.shape), bounds=[side.numpy() for side in flat(ball.box)])
            if not ball.is_box:
                limits.append(cvxpy.norm1(x - ball.x[row].flatten().numpy()) <= ball.threat.eps)
            values.append(x)
        elif isinstance(node.op, Affine):
            bias = torch.zeros(()) if node.op.bias is None else node.op.bias
            parts = [matrix @ value for matrix, value in zip(network.matrices[node], before)]
            values.append(sum(parts) + bias.expand(node.shape).flatten().double().numpy())
        else:
            assert isinstance(node.op, Rectifier)
            inner, outer = (cvxpy.Variable(math.prod(node.shape)) for _ in range(2))
            limits.append(inner == before[0])
            inside = flat(bounds.intervals[node.parents[0].index])
            if refine and not node.parents[0].affine:
                inside = _refined(node.op, inside, Program(x, inner, limits))
            limits += _rectified(node.op, inside, inner, outer, exact)
            values.append(outer)
    return Program(x, values[-1], limits)


def _refined(op: Rectifier, inside: Interval, program: Program) -> Interval:
    """The bounds that a program gives on neurons before ``op``; where it fails, those that there are."""
    lower, upper = (side.clone() for side in inside)
    for neuron in op.unsettled(inside).nonzero():
        one = torch.zeros_like(lower).index_fill(0, neuron, 1)
        low, high = program.least(one), program.least(-one)
        lower[neuron] = lower[neuron].clamp_min(low.bound if low.optimal else -math.inf)
        upper[neuron] = upper[neuron].clamp_max(-high.bound if high.optimal else math.inf)
    return Interval(lower, upper)


def _rectified(op: Rectifier, inside: Interval, x: Any, y: Any, exact: bool) -> list[Any]:
    """What ties the neurons ``y`` to ``x``, before their (leaky) ReLU."""
    import cvxpy

    lines, open_ = op.lines(inside, "zero"), op.unsettled(inside)
    limits = [
        y >= cvxpy.multiply(lines.lower.numpy(), x),
        y >= cvxpy.multiply(lines.lower.masked_fill(open_, 1).numpy(), x),
        y <= cvxpy.multiply((lines.lower + lines.gap).numpy(), x) + lines.upper_offset.numpy(),
    ]
    if exact and open_.any():
        (at,), flat = open_.numpy().nonzero(), op.slope
        lower, upper = (1 - flat) * inside.lower[open_].numpy(), (1 - flat) * inside.upper[open_].numpy()
        above = cvxpy.Variable(len(at), boolean=True)
        limits.append(y[at] <= x[at] - cvxpy.multiply(lower, 1 - above))
        limits.append(y[at] <= flat * x[at] + cvxpy.multiply(upper, above))
    return limits
