"""Bounds by linear relaxation, carried back from what is to be bounded to the input (CROWN; Zhang et al., 2018)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Affine, Graph, Node
from robustbench_lite.bounds.maps import Full, Patches, Terms, dot
from robustbench_lite.bounds.relax import Interval, Lines, Nonlinear, Rectifier, Slopes

MEMORY = 4 * 2**20  # bytes that are carried back at once; more does not pay, for caches are small
COPIES = 6  # of the widest layer's coefficients that live at once

Start = tuple[Node, int]  # where functions begin, and at which turn
Neurons = tuple[tuple[Tensor, ...], Tensor]  # places (row, axis by axis), and 1 for a lower bound or -1 for an upper


@dataclass
class Free:
    """Lower slopes to be learned, one a (leaky) ReLU and bounded function, as shares of the way from the slope below
    zero to 1. They are made when first asked for, from chosen slopes."""

    shares: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # by start, turn and node on the way
    neurons: dict[tuple[int, int], Neurons] = field(default_factory=dict)  # by start and turn


class Bounds:
    """Bounds on the nodes of a graph over a ball, and on linear functions of its output.

    Every nonlinear node is put between lines, whose lower ``slopes`` are a choice, or between constants (None, which
    makes all of it interval bounds; Gowal et al., 2018). What lines need, bounds on what goes in, comes from the same
    relaxation (``refine``) where intervals leave a neuron unsettled, or from intervals alone (CROWN-IBP; Zhang et al.,
    2020). With parallel slopes and ``refine`` it is the dual network of Wong & Kolter (2018).

    ``memory`` limits, in bytes, what is carried back at once. ``free`` are slopes in place of chosen ones, ``within``
    bounds on all nodes that hold already.
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
        self.graph, self.ball = graph, ball
        self.intervals: list[Interval] = []
        self._memory, self._free = memory, free
        self._lines: dict[int, Lines | None] = {}
        for node in graph.nodes:
            inside = [self.intervals[parent.index] for parent in node.parents]
            if isinstance(node.op, Nonlinear):
                (before,) = node.parents
                if self._improves(before, refine and slopes is not None):
                    inside = [self._refined(before, node.op)]
                    self.intervals[before.index] = inside[0]
                self._lines[node.index] = node.op.lines(inside[0], slopes) if slopes else None
            if node.op is None:
                self.intervals.append(ball.box)
            else:
                self.intervals.append(within[node.index] if within else node.interval(*inside))

    def lower(self, functions: Tensor) -> Tensor:
        """Lower bounds (B, S) on linear functions (B, S, ...) of the network's output."""
        count, values = functions.shape[1], functions.flatten(0, 1).to(self.ball.x)
        rows = torch.arange(len(functions), device=values.device).repeat_interleave(count)
        if torch.is_grad_enabled() and self._free is None:  # what is kept for the backward pass, pieces do not save
            least, _ = self._carry((self.graph.output, 0), Full(values, rows, count))
        else:
            least = self._least((self.graph.output, 0), len(rows), lambda part: Full(values[part], rows[part]))
        return least.view(len(functions), count)

    def _improves(self, node: Node, refine: bool) -> bool:
        """Whether linear functions should bound the node: to refine it, unless intervals are exact as behind a box."""
        if not self.ball.is_box:
            return refine or node.affine
        return refine and not (isinstance(node.op, Affine) and len(node.parents) == 1 and node.parents[0].free)

    def _refined(self, node: Node, op: Nonlinear) -> Interval:
        """Bounds on the neurons before ``op``: the one nearer to 0, the other only where that leaves them unsettled."""
        lower, upper = self.intervals[node.index]
        near = torch.where(upper < -lower, -1, 1).to(lower.dtype)
        for turn, side in enumerate((near, -near)):
            found = op.unsettled(Interval(lower, upper)).nonzero(as_tuple=True)
            neurons = found, side[found]
            if self._free is not None:
                neurons = self._free.neurons.setdefault((node.index, turn), neurons)
            where, sign = neurons
            least = self._least((node, turn), len(sign), partial(_single, node, neurons))
            low, high = lower[where], upper[where]
            best = torch.maximum(least, torch.where(sign > 0, low, -high))
            if self._free is not None:
                best = least + (best - least).detach()  # slopes that made it worse still learn
            lower = lower.index_put(where, torch.where(sign > 0, best, low))
            upper = upper.index_put(where, torch.where(sign > 0, high, -best))
        return Interval(lower, upper)

    def _least(self, start: Start, count: int, make: Callable[[slice], Terms]) -> Tensor:
        """The least values (N,) of ``count`` linear functions of one node, in pieces that fit in memory."""
        if not count:
            return self.ball.x.new_zeros(0)
        if self._free is not None:
            return self._carry(start, make(slice(count)))[0]
        with torch.no_grad():
            _, widest = self._carry(start, make(slice(1)))
        size = max(1, self._memory // (COPIES * widest * self.ball.x.element_size()))
        return torch.cat([self._carry(start, make(slice(at, at + size)))[0] for at in range(0, count, size)])

    def _carry(self, start: Start, terms: Terms) -> tuple[Tensor, int]:
        """Carries linear functions of a node back to the input: their least values, and the widest layer passed."""
        pending: dict[Node, Terms] = {start[0]: terms}
        total, widest = terms.values.new_zeros(len(terms)), 0

        def hand(parent: Node, back: Terms) -> None:
            pending[parent] = pending[parent] + back if parent in pending else back

        for node in reversed(self.graph.nodes[: start[0].index + 1]):
            if node not in pending:
                continue
            terms = pending.pop(node)
            widest = max(widest, terms.values[0].numel())
            if node.op is None:
                total = total + self.ball.minimum(terms)
            elif isinstance(node.op, Affine):
                terms = terms.inside()
                if node.op.bias is not None:
                    total = total + terms.constant(node.op.bias.to(total), node.shape)
                for parent, map in zip(node.parents, node.op.maps):
                    hand(parent, map.transpose(terms))
            elif (lines := self._lines[node.index]) is None:
                total = total + terms.least(*self.intervals[node.index])
            else:
                back, offset = self._replaced(start, node, terms, lines)
                total = total + offset
                hand(node.parents[0], back)
        return total, widest

    def _replaced(self, start: Start, node: Node, terms: Terms, lines: Lines) -> tuple[Terms, Tensor]:
        """Lines in place of the activations: the lower one where a coefficient is positive, else the upper."""
        if isinstance(terms, Full) and terms.each and lines.lower_offset is None:
            values, offset = _Replaced.apply(terms.values, terms.each, lines.lower, lines.gap, lines.upper_offset)
            return terms.with_values(values), offset
        values, negative = terms.values, terms.values.clamp(max=0)
        below, gap = terms.at(lines.lower), terms.at(lines.gap)
        above_offset = terms.at(lines.upper_offset)
        if self._free is not None and isinstance(node.op, Rectifier):
            key = start[0].index, start[1], node.index
            least = node.op.slope
            if key not in self._free.shares:  # a batch of one has its slopes once, for all functions
                self._free.shares[key] = (below > least).to(values.dtype).expand_as(values).clone().requires_grad_()
            share = self._free.shares[key]
            change = torch.where(above_offset > 0, least + (1 - least) * share - below, 0)
            below, gap = below + change, gap - change
        offset = dot(negative, above_offset)
        if lines.lower_offset is not None:
            offset = offset + dot(values - negative, terms.at(lines.lower_offset))
        return terms.with_values(torch.addcmul(values * below, negative, gap)), offset


class _Replaced(torch.autograd.Function):
    """:meth:`Bounds._replaced` where all inputs have equally many functions, with fewer passes over their coefficients:
    a third faster, backwards included."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, each: int, below: Tensor, gap: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        many, below, gap = values.unflatten(0, (-1, each)), below.unsqueeze(1), gap.unsqueeze(1)
        negative = many.clamp(max=0)
        ctx.save_for_backward(many, below, gap, offset)
        least = negative.flatten(2) @ offset.flatten(1).unsqueeze(2)
        return torch.addcmul(many * below, negative, gap).flatten(0, 1), least.flatten()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        many, below, gap, offset = ctx.saved_tensors
        negative = many.clamp(max=0)
        carried, least = grads[0].view_as(many), grads[1].view(*many.shape[:2], *[1] * (many.dim() - 2))
        where_negative = torch.addcmul(carried * gap, least, offset.unsqueeze(1))
        of_values = torch.addcmul(carried * below, negative.sign(), where_negative, value=-1).flatten(0, 1)
        of_below = (carried * many).sum(1) if ctx.needs_input_grad[2] else None
        of_offset = (negative * least).sum(1)
        return of_values, None, of_below, (carried * negative).sum(1), of_offset


def differences(labels: Tensor, classes: int) -> Tensor:
    """The linear functions of the logits that make a margin, (B, C-1, C): the label's less each other's, in order."""
    one = torch.eye(classes, device=labels.device)
    others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    return one[labels].unsqueeze(1) - one[others + (others >= labels.unsqueeze(1))]


def _single(node: Node, neurons: Neurons, part: slice) -> Terms:
    """A part of the neurons, each times its sign."""
    (rows, *place), sign = (axis[part] for axis in neurons[0]), neurons[1][part]
    one = torch.arange(len(rows), device=rows.device)
    if len(node.shape) == 3:
        channel, down, along = place
        values = sign.new_zeros(len(rows), node.shape[0], 1, 1).index_put((one, channel), sign.view(-1, 1, 1))
        size = (node.shape[1], node.shape[2])
        return Patches(values, rows, torch.stack([down, along], 1), size, size)
    return Full(sign.new_zeros(len(rows), *node.shape).index_put((one, *place), sign), rows)
