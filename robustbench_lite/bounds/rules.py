"""How the layers of torch are bounded, one rule a function."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.bounds.graph import ROWS, Affine, Made, Node, Unbounded, rule
from robustbench_lite.bounds.maps import Convolution, General, Identity, Map, Matrix, Pair, Reshape, Scale, Shape
from robustbench_lite.bounds.relax import GELU, SIGMOID, SILU, TANH, Largest, Rectifier


def _through(x: Node, map: Map, bias: Tensor | None = None) -> Made:
    return Affine((map,), bias), (x,)


def _constant(value: Any) -> Any:
    """A weight: something that does not depend on the input."""
    if isinstance(value, Node):
        raise Unbounded("two things that depend on the input meet in it")
    return value


def _beside(x: Node, value: Any) -> Tensor:
    """A constant that is added to ``x``, or multiplied with it, in the shape that broadcasts against one input."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if tensor.dim() > len(x.shape):
        if len(tensor) == ROWS and not torch.equal(tensor, tensor[:1].expand_as(tensor)):
            raise Unbounded("it differs from input to input")
        tensor = tensor[0]
    return tensor


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@rule("linear")
def linear(shape: Shape, x: Node, weight: Tensor, bias: Tensor | None = None) -> Made:
    return _through(x, Matrix(_constant(weight)), bias)


@rule("matmul", "__matmul__")
def matmul(shape: Shape, x: Node, weight: Tensor) -> Made:
    if not isinstance(x, Node) or _constant(weight).dim() != 2:
        raise Unbounded("only products with a matrix on the right are")
    return _through(x, Matrix(weight.T))


@rule("conv2d")
def conv2d(
    shape: Shape,
    x: Node,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Made:
    stride, dilation = _pair(stride), _pair(dilation)
    reach = [step * (length - 1) for step, length in zip(dilation, _constant(weight).shape[2:])]
    if padding == "same" and any(length % 2 for length in reach):
        raise Unbounded("it pads one side more than the other")
    padding = {"same": tuple(length // 2 for length in reach), "valid": (0, 0)}.get(padding, padding)
    map = Convolution(weight, _pair(x.shape[1:]), stride, _pair(padding), dilation, groups)
    return _through(x, map, None if bias is None else bias.view(-1, 1, 1))


@rule("batch_norm")
def batch_norm(
    shape: Shape,
    x: Node,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Made:
    if training or running_mean is None or running_var is None:
        raise Unbounded("it normalises with the statistics of the batch; put the network in eval mode")
    factor = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    offset = (0 if bias is None else bias) - running_mean * factor
    channels = [-1, *[1] * (len(shape) - 1)]
    return _through(x, Scale(factor.view(channels)), offset.view(channels))


@rule("add", "add_", "__add__", "__radd__", "__iadd__")
def add(shape: Shape, x: Any, other: Any, alpha: float = 1) -> Made:
    if alpha != 1:
        raise Unbounded(f"its alpha is {alpha:g}")
    if not isinstance(x, Node):
        x, other = other, x
    if not isinstance(other, Node):
        _same(shape, x)
        return _through(x, Identity(), _beside(x, other))
    _same(shape, x, other)
    return Affine((Identity(), Identity())), (x, other)


@rule("sub", "sub_", "__sub__", "__isub__")
def sub(shape: Shape, x: Any, other: Any, alpha: float = 1) -> Made:
    minus = Scale(torch.tensor(-1.0))
    if alpha != 1:
        raise Unbounded(f"its alpha is {alpha:g}")
    if not isinstance(other, Node):
        _same(shape, x)
        return _through(x, Identity(), -_beside(x, other))
    if not isinstance(x, Node):
        _same(shape, other)
        return _through(other, minus, _beside(other, x))
    _same(shape, x, other)
    return Affine((Identity(), minus)), (x, other)


@rule("rsub", "__rsub__")
def rsub(shape: Shape, x: Any, other: Any) -> Made:
    return sub(shape, other, x)


@rule("neg", "__neg__")
def neg(shape: Shape, x: Node) -> Made:
    return _through(x, Scale(torch.tensor(-1.0)))


@rule("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply")
def mul(shape: Shape, x: Any, other: Any) -> Made:
    if not isinstance(x, Node):
        x, other = other, x
    _same(shape, x)
    return _through(x, Scale(_beside(x, _constant(other))))


@rule("div", "div_", "__truediv__", "__itruediv__")
def div(shape: Shape, x: Any, other: Any) -> Made:
    if not isinstance(x, Node):
        raise Unbounded("it divides by something that depends on the input")
    return mul(shape, x, 1 / _constant(other))


def _same(shape: Shape, *nodes: Node) -> None:
    if any(node.shape != shape for node in nodes):
        raise Unbounded("it repeats what depends on the input")


@rule("flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to", "float", "double")
def reshape(shape: Shape, x: Node, *_: Any, **__: Any) -> Made:
    if x.shape == shape:
        return _through(x, Identity())
    return _through(x, Reshape(x.shape, shape))


@rule("permute")
def permute(shape: Shape, x: Node, *order: Any) -> Made:
    if (order[0][0] if isinstance(order[0], Sequence) else order[0]) != 0:
        raise Unbounded("it moves the axis of the inputs")
    return _through(x, General(lambda value: value.permute(*order), x.shape, mixes=False))


@rule("transpose")
def transpose(shape: Shape, x: Node, first: int, second: int) -> Made:
    if 0 in (first % (len(shape) + 1), second % (len(shape) + 1)):
        raise Unbounded("it moves the axis of the inputs")
    return _through(x, General(lambda value: value.transpose(first, second), x.shape, mixes=False))


@rule("__getitem__")
def getitem(shape: Shape, x: Node, index: Any) -> Made:
    if not isinstance(index, tuple) or index[0] not in (slice(None), Ellipsis):
        raise Unbounded("it picks among the inputs")
    return _through(x, General(lambda value: value[index], x.shape, mixes=False))


@rule("pad")
def pad_(shape: Shape, x: Node, pad: Any, mode: str = "constant", value: float | None = None) -> Made:
    if mode != "constant":
        raise Unbounded(f"it pads in the mode {mode}, not constant")
    frame = F.pad(torch.zeros(1, *x.shape), pad, value=value)[0] if value else None
    return _through(x, General(lambda values: F.pad(values, pad), x.shape, mixes=False), frame)


@rule("cat", "concat", "concatenate")
def cat(shape: Shape, tensors: Any, dim: int = 0) -> Made:
    axis = dim % (len(shape) + 1)
    nodes = [part for part in tensors if isinstance(part, Node)]
    if axis == 0 or len(nodes) < len(tensors):
        raise Unbounded("it joins inputs, or constants with them")
    maps, start = [], 0
    for node in nodes:
        stop = start + node.shape[axis - 1]
        frame = [0, 0] * (len(shape) - axis) + [start, shape[axis - 1] - stop]
        maps.append(General(lambda value, frame=frame: F.pad(value, frame), node.shape, mixes=False))
        start = stop
    return Affine(tuple(maps)), tuple(nodes)


@rule("avg_pool2d")
def avg_pool2d(shape: Shape, x: Node, *args: Any, **kwargs: Any) -> Made:
    return _through(x, General(lambda value: F.avg_pool2d(value, *args, **kwargs), x.shape))


@rule("adaptive_avg_pool2d")
def adaptive_avg_pool2d(shape: Shape, x: Node, output_size: Any) -> Made:
    return _through(x, General(lambda value: F.adaptive_avg_pool2d(value, output_size), x.shape))


@rule("mean")
def mean(shape: Shape, x: Node, *args: Any, **kwargs: Any) -> Made:
    return _through(x, General(lambda value: value.mean(*args, **kwargs), x.shape))


@rule("sum")
def sum_(shape: Shape, x: Node, *args: Any, **kwargs: Any) -> Made:
    return _through(x, General(lambda value: value.sum(*args, **kwargs), x.shape))


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
def dropout(shape: Shape, x: Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> Made:
    if training and p:
        raise Unbounded("it is random; put the network in eval mode")
    return _through(x, Identity())


@rule("relu", "relu_")
def relu(shape: Shape, x: Node, inplace: bool = False) -> Made:
    return Rectifier(), (x,)


@rule("leaky_relu", "leaky_relu_")
def leaky_relu(shape: Shape, x: Node, negative_slope: float = 0.01, inplace: bool = False) -> Made:
    if not 0 <= negative_slope <= 1:
        raise Unbounded(f"its slope below zero is {negative_slope:g}, not between 0 and 1")
    return Rectifier(float(negative_slope)), (x,)


@rule("sigmoid", "sigmoid_")
def sigmoid(shape: Shape, x: Node) -> Made:
    return SIGMOID, (x,)


@rule("tanh", "tanh_")
def tanh(shape: Shape, x: Node) -> Made:
    return TANH, (x,)


@rule("gelu")
def gelu(shape: Shape, x: Node, approximate: str = "none") -> Made:
    if approximate != "none":
        raise Unbounded(f"it is approximated by {approximate}")
    return GELU, (x,)


@rule("silu")
def silu(shape: Shape, x: Node, inplace: bool = False) -> Made:
    return SILU, (x,)


@rule("max_pool2d")
def max_pool2d(shape: Shape, x: Node, *args: Any, return_indices: bool = False, **kwargs: Any) -> Made:
    return Largest(lambda value: F.max_pool2d(value, *args, **kwargs)), (x,)
