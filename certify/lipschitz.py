"""Certificates by Lipschitz constants: sound upper bounds on the layers' operator norms, multiplied."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from robustbench_lite.certificate import SOUND, Certificate
from robustbench_lite.defended import Defended, ask
from robustbench_lite.models import Adapted
from robustbench_lite.noise import Noise
from robustbench_lite.registry import certifier
from robustbench_lite.threat import ThreatModel
from robustbench_lite.wording import one_line

SAMPLES = 16  # of a symbol for each degree that it has: its largest value is found to within 2 %, which are then added

Rule = TypeVar("Rule", bound=Callable[[Any], float])
RULES: dict[type[nn.Module], Callable[[Any], float]] = {}


@certifier("lipschitz")
@dataclass(frozen=True)
class Lipschitz:
    """No logit gains on the label's faster than the network's Lipschitz constant allows (Tsuzuku et al., 2018).

    The constant is a product, in residual sums a sum, of bounds on l2 operator norms; for a last layer that is linear,
    the norm of the difference of two of its rows stands instead. An l1 ball lies in the l2 ball of the same size, an
    linf ball of d numbers in that of sqrt(d) times the size.
    """

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    exact_radius: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{tsuzuku2018lipschitz,
  title     = {Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance for Deep Neural Networks},
  author    = {Yusuke Tsuzuku and Issei Sato and Masashi Sugiyama},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2018}
}"""

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        with torch.no_grad():
            logits = ask(model, x, len(x))
        slopes = pairwise(model, x).to(logits)[y]
        if threat.norm.name == "linf":
            slopes = slopes * math.sqrt(x[0].numel())
        gap = logits.gather(1, y.unsqueeze(1)) - logits
        gap = gap.scatter(1, y.unsqueeze(1), torch.inf)
        margin = (gap - slopes * threat.eps).amin(1)
        radius = ((gap - SOUND[gap.dtype]) / slopes).amin(1).clamp_min(0)
        return replace(Certificate.of_margins(margin, y, threat.eps), radius=radius)


@torch.no_grad()
def pairwise(model: nn.Module, x: Tensor) -> Tensor:
    """How much the difference of each two logits can change with an l2 step of length one: (C, C) float64.

    Inputs shaped as ``x`` (B, ...) say what shapes are inside.

    Raises:
        ValueError: for a model that cannot be traced, or an operation that is not covered.
    """
    net, scale = bare(model)
    traced = trace(net, x)
    (answer,) = (node.args[0] for node in traced.graph.nodes if node.op == "output")
    bounds = constants(traced)
    last = traced.get_submodule(answer.target) if answer.op == "call_module" else None
    if isinstance(last, nn.Linear):
        rows = last.weight.double()
        apart = torch.stack([(rows - row).norm(dim=1) for row in rows])
        return scale * bounds[answer.args[0]] * apart
    classes = answer.meta["tensor_meta"].shape[1]
    return torch.full((classes, classes), scale * math.sqrt(2) * bounds[answer], dtype=torch.float64)


@torch.no_grad()
def layer_norms(model: nn.Module) -> dict[str, float]:
    """A bound on the l2 operator norm of each layer, by the layer's name in the model.

    Raises:
        ValueError: for a layer that is not covered.
    """
    leaves = {name: module for name, module in bare(model)[0].named_modules() if not list(module.children())}
    return {name: layer_norm(name, module) for name, module in leaves.items()}


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
        traced = fx.GraphModule(called, fx.Tracer().trace(called))
        same = torch.allclose(ShapeProp(traced).propagate(x[:1].clone()), net(x[:1].clone()))
    except Exception as error:  # whatever a forward does with a stand-in for a tensor
        raise ValueError(f"certifier lipschitz cannot trace {type(net).__name__}: {one_line(error)}") from error
    if not same:  # a trace does not see that x += y changes what others hold
        raise ValueError(f"certifier lipschitz cannot trace {type(net).__name__}: its graph answers otherwise")
    return traced


def constants(traced: fx.GraphModule) -> dict[fx.Node, float]:
    """A Lipschitz constant of each node as a function of the input; 0 where it does not depend on it."""
    bounds: dict[fx.Node, float] = {}
    for node in traced.graph.nodes:
        before = [bounds[operand] for operand in _operands(node)]
        if node.op == "placeholder":
            bounds[node] = 1.0
        elif not any(before) or _asks_for_shape(node):
            bounds[node] = 0.0
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
    return max(convolution_norm(kernel, _pair(layer.stride), _pair(layer.dilation)) for kernel in groups)


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
    size, stride, dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
    return math.sqrt(math.prod(math.ceil(k / s) if d == 1 else k for k, s, d in zip(size, stride, dilation)))


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
