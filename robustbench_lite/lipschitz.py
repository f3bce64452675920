"""Lipschitz constants: sound upper bounds on the layers' l2 operator norms, multiplied; and Parseval frames."""

import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from robustbench_lite.classifiers import Adapted
from robustbench_lite.defended import Defended
from robustbench_lite.models import ConvexSum
from robustbench_lite.wording import one_line

SAMPLES = 16  # of a symbol for each degree that it has: its largest value is found to within 2 %, which are then added

Rule = TypeVar("Rule", bound=Callable[[Any], float])
RULES: dict[type[nn.Module], Callable[[Any], float]] = {}


@torch.no_grad()
def pairwise(model: nn.Module, x: Tensor) -> Tensor:
    """How much the difference of each two logits can change with an l2 step of length one: (C, C) float64.

    Inputs shaped as ``x`` (B, ...) say what shapes are inside.

    Raises:
        ValueError: for a model that cannot be traced, or an operation that is not covered.
    """
    net, scale = bare(model)
    traced = trace(net, x)
    answer, bounds = _answer(traced), constants(traced)
    last = traced.get_submodule(answer.target) if answer.op == "call_module" else None
    if isinstance(last, nn.Linear):
        rows = last.weight.double()
        apart = torch.stack([(rows - row).norm(dim=1) for row in rows])
        return scale * bounds[answer.args[0]] * apart
    classes = answer.meta["tensor_meta"].shape[1]
    return torch.full((classes, classes), scale * math.sqrt(2) * bounds[answer], dtype=torch.float64)


@torch.no_grad()
def constant(model: nn.Module, x: Tensor) -> float:
    """How far the logits can move, in l2, with an l2 step of length one.

    Raises:
        ValueError: for a model that cannot be traced, or an operation that is not covered.
    """
    net, scale = bare(model)
    traced = trace(net, x)
    return scale * constants(traced)[_answer(traced)]


@torch.no_grad()
def layer_norms(model: nn.Module) -> dict[str, float]:
    """A bound on the l2 operator norm of each layer, by the layer's name in the model.

    Raises:
        ValueError: for a layer that is not covered.
    """
    leaves = {name: module for name, module in bare(model)[0].named_modules() if not list(module.children())}
    return {name: layer_norm(name, module) for name, module in leaves.items()}


@torch.no_grad()
def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Those of each linear layer and convolution, descending, by the layer's name; see :func:`frame`."""
    layers = {name: layer for name, layer in bare(model)[0].named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    values = {name: torch.linalg.svdvals(frame(layer)).flatten() for name, layer in layers.items()}
    return {name: some.sort(descending=True).values for name, some in values.items()}


def frame(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The matrices (groups, rows, columns) whose singular values bound a layer's operator norm (Cisse et al., 2017).

    Of a convolution they are its groups' kernels, unfolded to (out, in * height * width) and multiplied by
    :func:`unfolding` (section 4.3).
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    kernels: Tensor = layer.weight.double().unflatten(0, (groups, -1))
    return kernels.flatten(2) * unfolding(layer)


def unfolding(layer: nn.Linear | nn.Conv2d) -> float:
    """How much longer an image can get when every window of a convolution is copied out; 1 for a linear layer."""
    if isinstance(layer, nn.Linear):
        return 1.0
    return math.sqrt(_windows(layer.kernel_size, layer.stride, layer.dilation))


def bare(model: nn.Module) -> tuple[nn.Module, float]:
    """The network within plain wrappers, and how much they stretch its inputs."""
    scale = 1.0
    while type(model) in (Defended, Adapted):
        if isinstance(model, Adapted):
            if model.probabilities:
                raise ValueError("certifier lipschitz does not cover probabilities: their logarithms have no bound")
            low, high = model.bounds
            scale *= (high - low) / model.get_buffer("std").min().item()
        model = model.get_submodule("model")
    if isinstance(model, Defended):
        raise ValueError(f"certifier lipschitz does not cover a model behind {type(model).__name__}")
    return model, scale


def trace(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The network as a graph whose nodes know their shapes."""
    called = nn.Sequential(net)  # so that what else its forward takes has its default
    try:
        traced = fx.GraphModule(called, _Tracer().trace(called))
        same = torch.allclose(ShapeProp(traced).propagate(x[:1].clone()), net(x[:1].clone()))
    except Exception as error:  # whatever a forward does with a stand-in for a tensor
        raise ValueError(f"certifier lipschitz cannot trace {type(net).__name__}: {one_line(error)}") from error
    if not same:  # a trace does not see that x += y changes what others hold
        raise ValueError(f"certifier lipschitz cannot trace {type(net).__name__}: its graph answers otherwise")
    return traced


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ConvexSum) or super().is_leaf_module(m, module_qualified_name)


def constants(traced: fx.GraphModule) -> dict[fx.Node, float]:
    """A Lipschitz constant of each node as a function of the input; 0 where it does not depend on it."""
    bounds: dict[fx.Node, float] = {}
    for node in traced.graph.nodes:
        before = [bounds[operand] for operand in _operands(node)]
        if node.op == "placeholder":
            bounds[node] = 1.0
        elif not any(before) or _asks_for_shape(node):
            bounds[node] = 0.0
        elif node.op == "call_module" and isinstance(layer := traced.get_submodule(node.target), ConvexSum):
            bounds[node] = sum(weight * bound for weight, bound in zip(layer.weights.abs().tolist(), before))
        elif node.op == "call_module":
            bounds[node] = before[0] * layer_norm(node.target.removeprefix("0."), traced.get_submodule(node.target))
        elif node.op == "output" or node.target in KEEPING:
            bounds[node] = before[0]
        elif node.target in SUMS and _plain(node, bounds):
            bounds[node] = sum(before)
        elif node.target is torch.cat:
            bounds[node] = math.hypot(*before)
        else:
            raise _not_covered(getattr(node.target, "__name__", node.target), f"operation {node.name}")
    return bounds


def _answer(traced: fx.GraphModule) -> Any:
    (answer,) = (node.args[0] for node in traced.graph.nodes if node.op == "output")
    return answer


KEEPING = {torch.flatten, torch.relu, F.relu, "flatten", "view", "reshape", "contiguous", "relu"}  # stretch nothing
SUMS = {operator.add, operator.sub, torch.add, "add"}


def _operands(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments, as often as it stands there."""
    operands: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), operands.append)
    return operands


def _asks_for_shape(node: fx.Node) -> bool:
    return node.target == "size" or (node.target is getattr and str(node.args[1]) == "shape")


def _plain(node: fx.Node, bounds: dict[fx.Node, float]) -> bool:
    """Whether a sum broadcasts nothing that depends on the input, which would count it more than once."""
    shapes = {tuple(one.meta["tensor_meta"].shape) for one in (node, *_operands(node)) if bounds.get(one, 1)}
    return len(shapes) == 1 and not node.kwargs


def _not_covered(what: str, where: str) -> ValueError:
    covered = ", ".join(sorted(kind.__name__ for kind in RULES)) + ", sums of equal shapes, cat and reshapes"
    return ValueError(f"certifier lipschitz does not cover {what} ({where}); it covers {covered}")


def layer_norm(name: str, layer: nn.Module) -> float:
    """A bound on a layer's l2 operator norm, or on the slope of an activation."""
    if type(layer) not in RULES:
        raise _not_covered(type(layer).__name__, f"layer {name}")
    return RULES[type(layer)](layer)


def covers(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Makes a function the rule for kinds of layers."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


@covers(nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.Tanh)
def _one(layer: nn.Module) -> float:
    return 1.0


@covers(nn.LeakyReLU)
def _leaky(layer: nn.LeakyReLU) -> float:
    return max(1.0, abs(layer.negative_slope))


@covers(nn.Sigmoid)
def _sigmoid(layer: nn.Sigmoid) -> float:
    return 0.25


@covers(ConvexSum)
def _sum(layer: ConvexSum) -> float:
    return float(layer.weights.abs().sum())  # if one input went both ways


@covers(nn.Linear)
def _linear(layer: nn.Linear) -> float:
    return _largest_singular_value(layer.weight.double())


@covers(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(layer: nn.BatchNorm2d) -> float:
    if layer.training or layer.running_var is None:
        raise ValueError("certifier lipschitz covers batch norm in eval mode, with running statistics")
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    return (scale if layer.weight is None else scale * layer.weight.double().abs()).max().item()


@covers(nn.Dropout, nn.Dropout2d)
def _dropout(layer: nn.Dropout) -> float:
    if layer.training:
        raise ValueError("certifier lipschitz covers dropout in eval mode")
    return 1.0


@covers(nn.Conv2d)
def _convolution(layer: nn.Conv2d) -> float:
    if layer.padding_mode != "zeros":
        raise ValueError(f"certifier lipschitz covers Conv2d with padding by zeros, not {layer.padding_mode}")
    groups = layer.weight.double().unflatten(0, (layer.groups, -1))
    by_symbols = max(convolution_norm(kernel, _pair(layer.stride), _pair(layer.dilation)) for kernel in groups)
    return min(by_symbols, _largest_singular_value(frame(layer)))


@covers(nn.AvgPool2d)
def _average(layer: nn.AvgPool2d) -> float:
    """The convolution that it is of every channel, if its windows all weigh the same."""
    if layer.ceil_mode or (layer.padding not in (0, (0, 0)) and not layer.count_include_pad):
        raise ValueError("certifier lipschitz covers AvgPool2d without ceil_mode, and with count_include_pad")
    size = _pair(layer.kernel_size)
    kernel = torch.ones(1, 1, *size, dtype=torch.float64) / (layer.divisor_override or math.prod(size))
    return convolution_norm(kernel, _pair(layer.stride), (1, 1))


@covers(nn.AdaptiveAvgPool2d)
def _mean(layer: nn.AdaptiveAvgPool2d) -> float:
    if _pair(layer.output_size) != (1, 1):
        raise ValueError(f"certifier lipschitz covers AdaptiveAvgPool2d to 1, not to {layer.output_size}")
    return 1.0


@covers(nn.MaxPool2d)
def _max_pool(layer: nn.MaxPool2d) -> float:
    """A number that changes can be the largest of as many windows as hold it."""
    return math.sqrt(_windows(layer.kernel_size, layer.stride, layer.dilation))


def _windows(size: Any, stride: Any, dilation: Any) -> int:
    """How many windows at most hold one number."""
    sizes = zip(_pair(size), _pair(stride), _pair(dilation))
    return math.prod(math.ceil(k / s) if d == 1 else k for k, s, d in sizes)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def convolution_norm(kernel: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> float:
    """A bound, for images of any size and any padding by zeros, at most 2 % above the norm on infinite images.

    There the Fourier transform turns a convolution into one matrix, its symbol, for each frequency (Sedghi et al.,
    2019); padding and cropping only restrict it. A stride makes a convolution without one of the phases of the input,
    taken as channels. The squared norm of a symbol is the largest of trigonometric polynomials of degree k - 1, which
    lose no more than a factor cos(pi (k - 1) / n) between n samples (M. Riesz, 1914).
    """
    out, channels, *taps = kernel.shape
    spread = [(k - 1) * d + 1 for k, d in zip(taps, dilation)]
    padded = [math.ceil(k / s) * s for k, s in zip(spread, stride)]
    full = kernel.new_zeros(out, channels, *padded)
    full[:, :, : spread[0] : dilation[0], : spread[1] : dilation[1]] = kernel
    phases = full.view(out, channels, padded[0] // stride[0], stride[0], padded[1] // stride[1], stride[1])
    phases = phases.permute(0, 1, 3, 5, 2, 4).reshape(out, -1, padded[0] // stride[0], padded[1] // stride[1])
    degrees = [k - 1 for k in phases.shape[2:]]
    rows, columns = (SAMPLES * degree or 1 for degree in degrees)
    lost = math.prod(math.cos(math.pi / SAMPLES) for degree in degrees if degree)
    along = torch.fft.rfft(phases, columns).unbind(-1)
    symbols = (torch.fft.fft(column, rows).permute(2, 0, 1) for column in along)  # one column at a time: they are large
    return max(map(_largest_singular_value, symbols)) / math.sqrt(lost)


def _largest_singular_value(matrices: Tensor) -> float:
    """The largest of all matrices (..., M, N), by the eigenvalues of the smaller Gram matrix."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    gram = matrices @ matrices.mH if wide else matrices.mH @ matrices
    return float(torch.linalg.eigvalsh(gram).max().clamp_min(0).sqrt())
