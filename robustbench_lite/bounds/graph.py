"""A network as a small graph of affine and nonlinear nodes, read off from one pass through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustbench_lite.bounds.maps import Map, Shape
from robustbench_lite.bounds.relax import Interval, Nonlinear

ROWS = 3  # inputs that the graph is read off from; with another number it is held against the network
READS = {"dim", "size", "__len__", "__get__", "numel", "is_floating_point", "stride", "is_contiguous", "get_device"}


class Unbounded(ValueError):
    """A network has a layer that cannot be bounded."""


@dataclass(frozen=True)
class Affine:
    """The sum of the parents, each through its map, and a ``bias`` that broadcasts against one input."""

    maps: tuple[Map, ...]
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """What one layer computes from its ``parents``; the input has no ``op``, and a nonlinear node one parent."""

    index: int
    layer: str
    shape: Shape
    op: Affine | Nonlinear | None = None
    parents: tuple[Node, ...] = ()

    def __call__(self, *values: Tensor) -> Tensor:
        assert self.op is not None
        if isinstance(self.op, Nonlinear):
            return self.op(*values)
        parts = [map(value) for map, value in zip(self.op.maps, values)]
        total = sum(parts[1:], parts[0])
        return total if self.op.bias is None else total + self.op.bias

    def interval(self, *inside: Interval) -> Interval:
        """Bounds on the node, given those on its parents."""
        assert self.op is not None
        if isinstance(self.op, Nonlinear):
            return self.op.interval(*inside)
        middle = self(*((lower + upper) / 2 for lower, upper in inside))
        radii = [map.magnitude((upper - lower) / 2) for map, (lower, upper) in zip(self.op.maps, inside)]
        radius = sum(radii[1:], radii[0])
        return Interval(middle - radius, middle + radius)

    @cached_property
    def affine(self) -> bool:
        """Whether it is an affine function of the input."""
        return not isinstance(self.op, Nonlinear) and all(parent.affine for parent in self.parents)

    @cached_property
    def free(self) -> bool:
        """Whether its neurons vary independently over a box of inputs."""
        mixes = isinstance(self.op, Affine) and (len(self.parents) > 1 or self.op.maps[0].mixes)
        return not mixes and all(parent.free for parent in self.parents)


@dataclass(frozen=True)
class Graph:
    """Nodes from the input to the logits, parents first. It holds the network's constants as they were when traced."""

    nodes: tuple[Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        values: list[Tensor] = []
        for node in self.nodes:
            values.append(node(*(values[parent.index] for parent in node.parents)) if node.op else x)
        return values[-1]

    @property
    def output(self) -> Node:
        return self.nodes[-1]


Made = tuple[Affine | Nonlinear, tuple[Node, ...]]
RULES: dict[str, Callable[..., Made]] = {}


def rule(*names: str) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Tells how the torch functions of these names are bounded.

    A rule is called with the shape of one output and then as the function is, with a :class:`Node` for each tensor that
    depends on the input. It returns an op and its parents, or raises :class:`Unbounded` with the reason.
    """

    def register(function: Callable[..., Made]) -> Callable[..., Made]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def trace(model: nn.Module, shape: Shape) -> Graph:
    """The graph of a network for inputs of ``shape``, read off from one pass through it.

    Its bounds are differentiable with respect to the network's parameters. Trace again after a training step: what the
    network derives from its parameters, such as a batch norm's factors, is computed here.

    Raises:
        Unbounded: names the layer that cannot be bounded, or says that the graph computes something else.
    """
    if any(getattr(module, "stochastic", False) for module in model.modules()):
        raise Unbounded("the network answers at random, and bounds are on one function")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with ExitStack() as stack:
        recorder = _Recorder(_probe(like, ROWS, shape), stack, model)
        with recorder:
            logits = model(recorder.x)
        graph = recorder.graph(logits)
    with torch.no_grad():
        other = _probe(like, ROWS + 2, shape).flip(-1)
        answer, expected = torch.cat([graph(part) for part in other.split(ROWS)]), model(other)
    if answer.shape != expected.shape or not (answer - expected).abs().amax() <= 1e-3 * expected.abs().amax():
        raise Unbounded("the network answers otherwise than its layers do one by one: is it random, or does it decide?")
    return graph


def _probe(like: Tensor, rows: int, shape: Shape) -> Tensor:
    """Inputs that look random: fractional parts of multiples of the golden ratio."""
    count = torch.arange(rows * torch.Size(shape).numel(), dtype=torch.float64)
    return (count * 0.6180339887498949 % 1).view(rows, *shape).to(like)


@dataclass
class _Recorder(TorchFunctionMode):
    """Watches every torch function and keeps a node for each tensor that depends on the input."""

    x: Tensor
    stack: ExitStack
    model: nn.Module
    nodes: list[Node] = field(default_factory=list)
    seen: dict[int, tuple[Tensor, Node]] = field(default_factory=dict)  # tensors too, so that no id is used again
    layers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._keep(self.x, None, ())
        for name, module in self.model.named_modules():
            label = f"{name or 'the network'} ({type(module).__name__})"
            enter = module.register_forward_pre_hook(lambda *_, label=label: self.layers.append(label))
            leave = module.register_forward_hook(lambda *_: self.layers.pop() and None)
            self.stack.callback(enter.remove)
            self.stack.callback(leave.remove)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_flat((args, kwargs)))
        answer = func(*args, **kwargs)
        if not any(id(value) in self.seen for value in given):
            return answer
        name = func.__name__
        if name in READS and not isinstance(answer, Tensor):
            return answer
        if name not in RULES:
            known = ", ".join(sorted({rule.__name__.strip("_") for rule in RULES.values()}))
            raise self._error(f"calls {name}, which cannot be bounded; what can: {known}")
        if not isinstance(answer, Tensor) or answer.shape[:1] != (ROWS,) or answer.dtype != self.x.dtype:
            raise self._error(f"calls {name} across inputs, or for another type of numbers")
        shape = tuple(answer.shape[1:])
        try:
            call = inspect.signature(RULES[name]).bind(shape, *self._nodes(args), **self._nodes(kwargs))
            op, parents = RULES[name](*call.args, **call.kwargs)
        except (Unbounded, TypeError) as error:
            raise self._error(f"calls {name}, which cannot be bounded here: {error}") from error
        self._keep(answer, op, parents)
        return answer

    def graph(self, answer: object) -> Graph:
        if id(answer) not in self.seen:
            raise Unbounded("the network's answer does not depend on its input")
        last = self.seen[id(answer)][1]
        return Graph(tuple(self.nodes[: last.index + 1]))

    def _keep(self, value: Tensor, op: Affine | Nonlinear | None, parents: tuple[Node, ...]) -> None:
        layer = self.layers[-1] if self.layers else "the input"
        node = Node(len(self.nodes), layer, tuple(value.shape[1:]), op, parents)
        self.nodes.append(node)
        self.seen[id(value)] = value, node

    def _nodes(self, value: Any) -> Any:
        """The arguments of a call, with nodes for the tensors that depend on the input."""
        if isinstance(value, Tensor) and id(value) in self.seen:
            return self.seen[id(value)][1]
        if isinstance(value, dict):
            return {key: self._nodes(part) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._nodes(part) for part in value)
        return value

    def _error(self, what: str) -> Unbounded:
        where = self.layers[-1] if self.layers else "the network"
        return Unbounded(f"{where} {what}")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (list, tuple)) or type(value).__name__ == "dict_values":
        for part in value:
            yield from _flat(part)
    else:
        yield value
