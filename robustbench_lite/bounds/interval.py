"""Interval bounds, one step forward through a network (Gowal et al., 2018)."""

from collections.abc import Sequence

from robustbench_lite.bounds.balls import Ball
from robustbench_lite.bounds.graph import Graph, Node
from robustbench_lite.bounds.relax import Interval, Nonlinear


def step(node: Node, inside: Sequence[Interval]) -> Interval:
    """Bounds on a node, given those on its parents."""
    assert node.op is not None
    if isinstance(node.op, Nonlinear):
        return node.op.interval(inside[0])
    middle = node(*((lower + upper) / 2 for lower, upper in inside))
    radius = sum(map.magnitude((upper - lower) / 2) for map, (lower, upper) in zip(node.op.maps, inside))
    return Interval(middle - radius, middle + radius)


def interval(graph: Graph, ball: Ball) -> list[Interval]:
    """Bounds on every node of the graph."""
    known: list[Interval] = []
    for node in graph.nodes:
        known.append(step(node, [known[parent.index] for parent in node.parents]) if node.op else ball.box)
    return known
