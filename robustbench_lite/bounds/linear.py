"""Bounds by linear relaxation, carried back from what is to be bounded to the input (CROWN; Zhang et al., 2018)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Affine, Graph, Node
from robustbench_lite.bounds.interval import step
from robustbench_lite.bounds.maps import Full, Patches, Terms, dot
from robustbench_lite.bounds.relax import Interval, Lines, Nonlinear, Rectifier, Slopes

MEMORY = 32 * 2**20  # bytes that carrying functions back may take at once: more is slower, for caches are small
COPIES = 6  # of the widest layer's coefficients that live at once

Start = tuple[Node, int]  # where functions begin, and at which turn
Free = dict[tuple[int, int, int], Tensor]  # lower slopes by the start (its index, turn) and the nonlinear node passed


class Bounds:
    """Bounds on the nodes of a graph over a ball, and on linear functions of its output.

    Every nonlinear node lies between lines whose lower ``slopes`` are chosen (None: between constants, which gives
    interval bounds). The intervals over which the lines hold come from intervals before them or, with ``refine``, by
    the same relaxation where the intervals leave a neuron unsettled. ``memory`` limits what is worked on at once, in bytes.

    Instead of ``slopes``, lower slopes of (leaky) ReLUs can be handed in as ``free``, one a neuron and bounded function;
    those that it lacks are added to it. ``within`` are bounds that hold already.
    """

    def __init__(
        self,
        graph: Graph,
        ball: Ball,
        slopes: Slopes | None = "adaptive",
        refine: bool = True,
        memory: int = MEMORY,
        free: Free | None = None,
        within: Sequence[Interval] | None = None,
    ) -> None:
        self.graph, self.ball, self.slopes = graph, ball, slopes
        self._memory, self._free, self._peak = memory, free, 0
        self.intervals: list[Interval] = []
        self._lines: dict[int, Lines | None] = {}
        for node in graph.nodes:
            inside = [self.intervals[parent.index] for parent in node.parents]
            if isinstance(node.op, Nonlinear):
                if self._unsettled_by_intervals(node.parents[0], refine):
                    inside = [self._refined(node.parents[0], node.op)]
                    self.intervals[node.parents[0].index] = inside[0]
                self._lines[node.index] = node.op.lines(inside[0], slopes) if slopes else None
            if node.op is None:
                self.intervals.append(ball.box)
            else:
                self.intervals.append(within[node.index] if within is not None else step(node, inside))

    def lower(self, functions: Tensor) -> Tensor:
        """Lower bounds (B, S) on linear functions (B, S, ...) of the network's output."""
        count = functions.shape[1]
        rows = torch.arange(len(self.ball), device=functions.device).repeat_interleave(count)
        values = functions.flatten(0, 1)
        return self._least((self.graph.output, 0), len(rows), lambda part: Full(values[part], rows[part])).view(-1, count)

    def _unsettled_by_intervals(self, node: Node, refine: bool) -> bool:
        """Whether linear functions bound the node's neurons better than intervals: not right after a box."""
        if self.ball.is_box:
            return refine and not (isinstance(node.op, Affine) and len(node.parents) == 1 and node.parents[0].free)
        return refine or node.affine

    def _refined(self, node: Node, op: Nonlinear) -> Interval:
        """Bounds on the neurons before ``op``; the far one only of those that the one near zero leaves unsettled."""
        lower, upper = self.intervals[node.index]
        open_ = op.unsettled(Interval(lower, upper))
        near = torch.where(upper < -lower, -1, 1).to(lower.dtype)
        for turn, side in enumerate((near, -near)):  # 1 for lower bounds, -1 for upper
            if self._free is None:
                open_ = op.unsettled(Interval(lower, upper))
            where = open_.nonzero(as_tuple=True)
            sign = side[where]
            least = self._least((node, turn), len(sign), lambda part: _single(node, where, sign, part))
            tighter = Interval(
                lower.index_put(where, torch.maximum(least, lower[where])),
                upper.index_put(where, torch.minimum(-least, upper[where])),
            )
            lower, upper = torch.where(side > 0, tighter.lower, lower), torch.where(side < 0, tighter.upper, upper)
        return Interval(lower, upper)

    def _least(self, start: Start, count: int, make: Callable[[slice], Terms]) -> Tensor:
        """Lower bounds (N,) on ``count`` linear functions of one node, in pieces that fit in memory."""
        if not count:
            return self.ball.x.new_zeros(0)
        if self._free is not None:
            return self._carry(start, make(slice(0, count)))
        self._peak = 0
        with torch.no_grad():
            self._carry(start, make(slice(0, 1)))
        size = max(1, self._memory // (COPIES * self._peak * self.ball.x.element_size()))
        return torch.cat([self._carry(start, make(slice(at, at + size))) for at in range(0, count, size)])

    def _carry(self, start: Start, terms: Terms) -> Tensor:
        """Carries linear functions of one node back to the input."""
        pending: dict[int, Terms] = {start[0].index: terms}
        total = torch.zeros(len(terms), dtype=terms.values.dtype, device=terms.values.device)
        for node in reversed(self.graph.nodes[: start[0].index + 1]):
            if node.index not in pending:
                continue
            terms = pending.pop(node.index)
            self._peak = max(self._peak, terms.values[0:1].numel())
            if node.op is None:
                total = total + self.ball.minimum(terms)
            elif isinstance(node.op, Affine):
                terms = terms.inside()
                if node.op.bias is not None:
                    total = total + terms.constant(node.op.bias.to(total), node.shape)
                for parent, map in zip(node.parents, node.op.maps):
                    back = map.transpose(terms)
                    pending[parent.index] = pending[parent.index] + back if parent.index in pending else back
            else:
                lines = self._lines[node.index]
                if lines is None:
                    total = total + _least_of_box(terms, self.intervals[node.index])
                    continue
                back, offset = self._replaced(start, node, terms, lines)
                total = total + offset
                parent = node.parents[0]
                pending[parent.index] = pending[parent.index] + back if parent.index in pending else back
        return total

    def _replaced(self, start: Start, node: Node, terms: Terms, lines: Lines) -> tuple[Terms, Tensor]:
        """The activations' lines in their place: the lower one where a coefficient is positive, else the upper."""
        values, negative = terms.values, terms.values.clamp(max=0)
        below, gap = terms.at(lines.lower), terms.at(lines.upper - lines.lower)
        above_offset = terms.at(lines.upper_offset)
        if self._free is not None and isinstance(node.op, Rectifier):
            chosen = self._free.setdefault((start[0].index, start[1], node.index), below.detach().clone().requires_grad_())
            shift = torch.where(above_offset > 0, chosen - below, 0)
            below, gap = below + shift, gap - shift
        offset = dot(negative, above_offset)
        if lines.lower_offset is not None:
            offset = offset + dot(values - negative, terms.at(lines.lower_offset))
        return terms.with_values(torch.addcmul(values * below, negative, gap)), offset


def _single(node: Node, where: tuple[Tensor, ...], sign: Tensor, part: slice) -> Terms:
    """A part of the neurons ``where`` (row, place), each times its sign."""
    (rows, *place), sign = (axis[part] for axis in where), sign[part]
    one = torch.arange(len(rows), device=rows.device)
    if len(node.shape) == 3:
        channel, down, along = place
        values = sign.new_zeros(len(rows), node.shape[0], 1, 1).index_put((one, channel), sign.view(-1, 1, 1))
        size = (node.shape[1], node.shape[2])
        return Patches(values, rows, torch.stack([down, along], 1), size, size)
    return Full(sign.new_zeros(len(rows), *node.shape).index_put((one, *place), sign), rows)


def _least_of_box(terms: Terms, box: Interval) -> Tensor:
    middle, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    return terms.dot(middle) - terms.with_values(terms.values.abs()).dot(radius)
