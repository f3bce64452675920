"""Linear maps between the layers of a network, and the linear functions that are carried back through them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4  # channels of images, for which a transposed convolution is better done as a matrix product
Shape = tuple[int, ...]
Pair = tuple[int, int]


def dot(values: Tensor, layer: Tensor) -> Tensor:
    """Row by row, (N,); a single row of ``layer`` is for all."""
    return (values * layer).flatten(1).sum(1)  # measured four times faster than as products of vectors


class Terms(ABC):
    """N linear functions of one layer, each for one input: ``rows`` (N,), in order, says for which of the batch."""

    values: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def at(self, layer: Tensor) -> Tensor:
        """What ``layer`` (B, ...) holds where the functions have their coefficients; (1, ...) is for all inputs."""

    @abstractmethod
    def full(self) -> Full:
        """The same with a coefficient for every neuron of the layer."""

    def inside(self) -> Terms:
        """The same with no coefficient outside the layer."""
        return self

    @abstractmethod
    def with_values(self, values: Tensor) -> Terms: ...

    def least(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The functions' least values over a box (B, ...): (N,)."""
        return self.dot((lower + upper) / 2) - dot(self.values.abs(), self.at((upper - lower) / 2))

    def constant(self, bias: Tensor, shape: Shape) -> Tensor:
        """The functions' values at ``bias``, which broadcasts against one input's ``shape``: (N,)."""
        if bias.dim() == 3 and bias.shape[1:] == (1, 1):
            return self.values.flatten(2).sum(2) @ bias.flatten().expand(self.values.shape[1])
        return self.dot(bias.expand(1, *shape))

    @abstractmethod
    def __add__(self, other: Terms) -> Terms: ...

    def dot(self, layer: Tensor) -> Tensor:
        """The functions' values at ``layer``: (N,)."""
        return dot(self.values, self.at(layer))


@dataclass(frozen=True)
class Full(Terms):
    """Coefficients (N, ...) for all neurons of the layer; ``each`` is above 0 where every input has so many."""

    values: Tensor
    rows: Tensor
    each: int = 0

    def at(self, layer: Tensor) -> Tensor:
        return layer if len(layer) == 1 else layer.index_select(0, self.rows)

    def full(self) -> Full:
        return self

    def with_values(self, values: Tensor) -> Full:
        return replace(self, values=values)

    def __add__(self, other: Terms) -> Full:
        return self.with_values(self.values + other.full().values)


@dataclass(frozen=True)
class Patches(Terms):
    """Coefficients (N, C, h, w) in a window of a layer (C, *size); what lies outside the layer is 0.

    Each window belongs to one position ``place`` (N, 2) of the ``origin`` (height and width) where the functions began,
    and its corner is ``place * stride - shift``.
    """

    values: Tensor
    rows: Tensor
    place: Tensor
    origin: Pair
    size: Pair
    stride: Pair = (1, 1)
    shift: Pair = (0, 0)

    def at(self, layer: Tensor) -> Tensor:
        rows = self.rows if len(layer) > 1 else torch.zeros_like(self.rows)
        first = int(rows[0])  # rows are in order: a piece of the functions needs a piece of the batch
        layer = layer[first : int(rows[-1]) + 1]
        (top, bottom), (left, right) = self._overhang()
        height, width = self.values.shape[2:]
        padded = F.pad(layer, (left, right, top, bottom))
        windows = padded.unfold(2, height, self.stride[0]).unfold(3, width, self.stride[1]).permute(0, 2, 3, 1, 4, 5)
        place = ((rows - first) * windows.shape[1] + self.place[:, 0]) * windows.shape[2] + self.place[:, 1]
        return windows.flatten(0, 2).index_select(0, place)

    def full(self) -> Full:
        (top, bottom), (left, right) = self._overhang()
        (height, width), channels = self.size, self.values.shape[1]
        down, along = self._corners()
        line = torch.arange(self.values.shape[2], device=down.device)
        column = torch.arange(self.values.shape[3], device=down.device)
        padded = (channels, top + height + bottom, left + width + right)
        place = (down.view(-1, 1, 1) + line.view(-1, 1)) * padded[2] + along.view(-1, 1, 1) + column
        place = place.flatten(1).unsqueeze(1).expand(-1, channels, -1)
        flat = self.values.new_zeros(len(self), channels, padded[1] * padded[2])
        whole = flat.scatter(2, place, self.values.flatten(2)).view(len(self), *padded)
        return Full(whole[:, :, top : top + height, left : left + width].contiguous(), self.rows)

    def with_values(self, values: Tensor) -> Patches:
        return replace(self, values=values)

    def __add__(self, other: Terms) -> Terms:
        if not isinstance(other, Patches) or other.stride != self.stride:
            return self.full() + other
        height, width = self.values.shape[2:], other.values.shape[2:]
        shift = (max(self.shift[0], other.shift[0]), max(self.shift[1], other.shift[1]))
        ends = [
            max(mine - before, theirs - after)
            for mine, theirs, before, after in zip(height, width, self.shift, other.shift)
        ]

        def grown(patches: Patches) -> Tensor:
            before = [new - old for new, old in zip(shift, patches.shift)]
            after = [end - (length - old) for end, length, old in zip(ends, patches.values.shape[2:], patches.shift)]
            return F.pad(patches.values, (before[1], after[1], before[0], after[0]))

        return replace(self, values=grown(self) + grown(other), shift=shift)

    def inside(self) -> Patches:
        if self._overhang() == ((0, 0), (0, 0)):
            return self
        return self.with_values(self.values * self.at(self.values.new_ones(1, 1, *self.size)))

    def _overhang(self) -> tuple[Pair, Pair]:
        """By how much windows may stick out before and after the layer, downwards and along."""
        return tuple(  # type: ignore[return-value]
            (max(0, shift), max(0, (origin - 1) * stride - shift + length - size))
            for origin, stride, shift, length, size in zip(
                self.origin, self.stride, self.shift, self.values.shape[2:], self.size
            )
        )

    def _corners(self) -> tuple[Tensor, Tensor]:
        """Where the windows begin in the layer padded by its overhang: (N,) and (N,)."""
        down, along = (
            self.place[:, axis] * self.stride[axis] - self.shift[axis] + max(0, self.shift[axis]) for axis in (0, 1)
        )
        return down, along


class Map(ABC):
    """A linear map from one layer to another, for batches."""

    mixes: bool = True  # whether a neuron depends on more than one of the layer before

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def magnitude(self, x: Tensor) -> Tensor:
        """The map with all its coefficients made positive."""

    @abstractmethod
    def transpose(self, terms: Terms) -> Terms:
        """Linear functions of what comes out as functions of what goes in."""


class Identity(Map):
    mixes = False

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def transpose(self, terms: Terms) -> Terms:
        return terms


@dataclass(frozen=True)
class Reshape(Map):
    """Other axes for the same neurons."""

    before: Shape
    after: Shape
    mixes = False

    def __call__(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.after)

    def magnitude(self, x: Tensor) -> Tensor:
        return self(x)

    def transpose(self, terms: Terms) -> Terms:
        terms = terms.full()
        return terms.with_values(terms.values.reshape(-1, *self.before))


@dataclass(frozen=True)
class Scale(Map):
    """Multiplication by ``factor``, which broadcasts against one input."""

    factor: Tensor
    mixes = False

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def magnitude(self, x: Tensor) -> Tensor:
        return x * self.factor.abs()

    def transpose(self, terms: Terms) -> Terms:
        if any(length > 1 for length in self.factor.shape[-2:]):
            terms = terms.full()
        return terms.with_values(terms.values * self.factor)


@dataclass(frozen=True)
class Matrix(Map):
    """``weight`` (out, in) on the last axis."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def magnitude(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())

    def transpose(self, terms: Terms) -> Terms:
        terms = terms.full()
        return terms.with_values(terms.values @ self.weight)


@dataclass(frozen=True)
class General(Map):
    """Any linear function of inputs of ``shape`` and of a ``weight`` (without one, its coefficients are positive)."""

    function: Callable[..., Tensor]
    shape: Shape
    weight: Tensor | None = None
    mixes: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x) if self.weight is None else self.function(x, self.weight)

    def magnitude(self, x: Tensor) -> Tensor:
        return self.function(x) if self.weight is None else self.function(x, self.weight.abs())

    def transpose(self, terms: Terms) -> Terms:
        terms = terms.full()
        with torch.enable_grad():
            zero = terms.values.new_zeros(len(terms), *self.shape).requires_grad_()
            answer = self(zero)
        (back,) = torch.autograd.grad(answer, zero, terms.values, create_graph=torch.is_grad_enabled())
        return terms.with_values(back)


@dataclass(frozen=True)
class Convolution(Map):
    """``weight`` (out, in / groups, height, width) over images of ``size``, padded with zeros."""

    weight: Tensor
    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)

    def magnitude(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.abs(), None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, terms: Terms) -> Terms:
        if isinstance(terms, Patches):
            window = [
                (length - 1) * stride + self._reach(axis) + 1
                for axis, (length, stride) in enumerate(zip(terms.values.shape[2:], self.stride))
            ]
            if math.prod(window) < math.prod(self.size):
                (s, t), (p, q) = self.stride, self.padding
                return replace(
                    terms,
                    values=self._back(terms.values, (window[0], window[1]), (0, 0)),
                    size=self.size,
                    stride=(terms.stride[0] * s, terms.stride[1] * t),
                    shift=(terms.shift[0] * s + p, terms.shift[1] * t + q),
                )
        terms = terms.full()
        return terms.with_values(self._back(terms.values, self.size, self.padding))

    def _reach(self, axis: int) -> int:
        return self.dilation[axis] * (self.weight.shape[2 + axis] - 1)

    def _back(self, values: Tensor, size: Pair, padding: Pair) -> Tensor:
        """The transposed convolution to images of ``size``."""
        channels, kernel = self.weight.shape[1], (self.weight.shape[2], self.weight.shape[3])
        if self.groups == 1 and values[0:1, 0].numel() == 1 and size == kernel:  # measured six times faster
            return (values.flatten(1) @ self.weight.flatten(1)).view(-1, channels, *kernel)
        if self.groups == 1 and channels < FEW:  # measured three times faster
            columns = self.weight.flatten(1).T @ values.flatten(2)
            return F.fold(columns, size, kernel, self.dilation, padding, self.stride)
        rest = [
            size[axis] + 2 * padding[axis] - self._reach(axis) - 1 - (values.shape[2 + axis] - 1) * self.stride[axis]
            for axis in (0, 1)
        ]
        return F.conv_transpose2d(values, self.weight, None, self.stride, padding, rest, self.groups, self.dilation)
