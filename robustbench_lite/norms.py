"""Norms: stateless, one instance each, for batches of perturbations, (B, C, H, W) or (B, D)."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.noise import Noise

MOVED = 1e-6  # a pixel has changed when any of its channels moved by more


class Norm(Protocol):
    """A norm is what it can do; ``eps`` is in its own units (l0: pixels, patch: share of the image area)."""

    @property
    def name(self) -> str: ...

    @property
    def shared(self) -> bool:
        """Whether coordinates share the budget, so that a step should waste none on those held at a pixel bound."""

    def size(self, delta: Tensor) -> Tensor:
        """How large each perturbation is: (B,)."""

    def limit(self, eps: float, like: Tensor) -> float:
        """The largest :meth:`size` that ``eps`` allows for inputs shaped as ``like``."""

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """The nearest point of the ball."""

    def confine(self, x: Tensor, clean: Tensor, eps: float, lower: float, upper: float) -> Tensor:
        """A point of the ball around ``clean`` and of the pixel range; the nearest one for linf and l1."""

    def steepest(self, grad: Tensor) -> Tensor:
        """The step of size one that raises a linear function most; zero where the gradient is. A new tensor."""

    def sample(self, noise: Noise, like: Tensor, eps: float) -> Tensor:
        """A random point of the ball (values of l0 and patch lie in [-1, 1])."""


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B,) shaped to broadcast against a batch ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def pixels(delta: Tensor) -> Tensor:
    """How far each pixel moved, largest channel: (B, H, W), or (B, D) for vectors."""
    return delta.abs().amax(1) if delta.dim() == 4 else delta.abs()


def _spread(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of pixels, shaped to broadcast over the channels of ``like``."""
    return mask.unsqueeze(1) if like.dim() == 4 else mask


def _energy(delta: Tensor) -> Tensor:
    """The squared change of each pixel: (B, H, W) or (B, D)."""
    return delta.square().sum(1) if delta.dim() == 4 else delta.square()


class _Shrinking(ABC):
    """Norms whose projection moves every coordinate towards 0, so that what was clipped before stays in range."""

    shared: ClassVar[bool] = True

    def limit(self, eps: float, like: Tensor) -> float:
        return eps

    @abstractmethod
    def project(self, delta: Tensor, eps: float) -> Tensor: ...

    def confine(self, x: Tensor, clean: Tensor, eps: float, lower: float, upper: float) -> Tensor:
        return self.project(x.clamp(lower, upper).sub_(clean), eps).add_(clean)


class Linf(_Shrinking):
    name: ClassVar[str] = "linf"
    shared: ClassVar[bool] = False

    def size(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        return delta.clamp(-eps, eps)

    def confine(self, x: Tensor, clean: Tensor, eps: float, lower: float, upper: float) -> Tensor:
        return x.clamp(lower, upper).sub_(clean).clamp_(-eps, eps).add_(clean)  # in place: a third off a step

    def steepest(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def sample(self, noise: Noise, like: Tensor, eps: float) -> Tensor:
        return (2 * noise.uniform(like) - 1) * eps


class L2(_Shrinking):
    name: ClassVar[str] = "l2"

    def size(self, delta: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return size

    def project(self, delta: Tensor, eps: float) -> Tensor:
        size = self.size(delta)
        return delta * by_row(torch.where(size > eps, eps / size, 1.0).to(delta.dtype), delta)

    def steepest(self, grad: Tensor) -> Tensor:
        # Scaled by the largest entry first: the squares of gradients of 1e-25 would vanish in float32.
        scaled = grad / by_row(grad.flatten(1).abs().amax(1), grad).clamp_min(torch.finfo(grad.dtype).tiny)
        return scaled / by_row(self.size(scaled), grad).clamp_min(0.5)

    def sample(self, noise: Noise, like: Tensor, eps: float) -> Tensor:
        way = self.steepest(noise.normal(like))
        radius = noise.at("radius").uniform(like.flatten(1)[:, :1]) ** (1 / way[0].numel())
        return way * by_row(radius[:, 0], like) * eps


class L1(_Shrinking):
    name: ClassVar[str] = "l1"
    share: ClassVar[float] = 0.01  # of the coordinates that a step changes (Tramer & Boneh, 2019, section 4)

    def size(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).sum(1)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        return _shrink_l1(delta, torch.full_like(delta, math.inf), eps)

    def confine(self, x: Tensor, clean: Tensor, eps: float, lower: float, upper: float) -> Tensor:
        delta = (x - clean).clamp(-1e9, 1e9)  # further out float64 loses a pixel's room beside its length
        return clean + _shrink_l1(delta, torch.where(delta > 0, upper - clean, clean - lower), eps)

    def steepest(self, grad: Tensor) -> Tensor:
        flat = grad.flatten(1)
        top = flat.abs().topk(max(1, round(self.share * flat.shape[1])), dim=1).indices
        step = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
        return (step / step.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)

    def sample(self, noise: Noise, like: Tensor, eps: float) -> Tensor:
        lengths = -torch.log1p(-noise.uniform(like))
        spare = -torch.log1p(-noise.at("spare").uniform(like.flatten(1)[:, :1]))[:, 0]
        return eps * noise.at("sign").signs(like) * lengths / by_row(self.size(lengths) + spare, like)


class L0(_Shrinking):
    name: ClassVar[str] = "l0"

    def size(self, delta: Tensor) -> Tensor:
        return (pixels(delta) > MOVED).flatten(1).sum(1).to(delta.dtype)

    def limit(self, eps: float, like: Tensor) -> float:
        return min(eps, like[0].numel()) // 1

    def project(self, delta: Tensor, eps: float) -> Tensor:
        energy = _energy(delta).flatten(1)
        keep = energy.topk(int(min(eps, energy.shape[1])), dim=1).indices
        mask = torch.zeros_like(energy, dtype=torch.bool).scatter(1, keep, True).view_as(_energy(delta))
        return torch.where(_spread(mask, delta), delta, 0)

    def steepest(self, grad: Tensor) -> Tensor:
        reach = grad.abs().sum(1) if grad.dim() == 4 else grad.abs()
        best = torch.zeros_like(reach.flatten(1)).scatter(1, reach.flatten(1).argmax(1, keepdim=True), 1)
        return grad.sign() * _spread(best.view_as(reach), grad)

    def sample(self, noise: Noise, like: Tensor, eps: float) -> Tensor:
        rank = noise.at("where").permutation(_energy(like))
        return torch.where(_spread(rank < self.limit(eps, like), like), 2 * noise.uniform(like) - 1, 0)


class Patch(_Shrinking):
    name: ClassVar[str] = "patch"

    def size(self, delta: Tensor) -> Tensor:
        moved = self._plane(pixels(delta)) > MOVED
        return torch.maximum(_extent(moved.any(1)), _extent(moved.any(2))).to(delta.dtype)

    def limit(self, eps: float, like: Tensor) -> float:
        height, width = self._plane(pixels(like[:1])).shape[1:]
        return math.inf if math.isinf(eps) else math.floor(math.sqrt(eps * height * width) + 1e-9)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Keeps the square that moved most; it may reach over the edge of an image that is narrower."""
        plane = self._plane(_energy(delta))
        if self.limit(eps, delta) >= max(plane.shape[1:]):
            return delta
        side = int(self.limit(eps, delta))
        if side == 0:
            return torch.zeros_like(delta)
        held = F.avg_pool2d(plane.unsqueeze(1), tuple(min(side, n) for n in plane.shape[1:]), stride=1)[:, 0]
        corner = held.flatten(1).argmax(1)
        return torch.where(self._square(corner, held.shape[2], side, delta), delta, 0)

    def steepest(self, grad: Tensor) -> Tensor:
        return l0.steepest(grad)

    def sample(self, noise: Noise, like: Tensor, eps: float) -> Tensor:
        height, width = self._plane(pixels(like[:1])).shape[1:]
        side = int(min(self.limit(eps, like), max(height, width)))
        columns = max(width - side, 0) + 1
        corner = noise.at("where").integers((max(height - side, 0) + 1) * columns, like.flatten(1)[:, :1])[:, 0]
        return torch.where(self._square(corner, columns, side, like), 2 * noise.uniform(like) - 1, 0)

    @staticmethod
    def _plane(image: Tensor) -> Tensor:
        """(B, H, W); a vector is an image of one row."""
        return image if image.dim() == 3 else image.unsqueeze(1)

    def _square(self, corner: Tensor, columns: int, side: int, like: Tensor) -> Tensor:
        """The pixels of the squares whose upper left corners are numbered ``corner``, ``columns`` to a row."""
        plane = self._plane(pixels(like))
        rows, cols = (torch.arange(n, device=like.device) for n in plane.shape[1:])
        top, left = (corner // columns).view(-1, 1, 1), (corner % columns).view(-1, 1, 1)
        down, along = rows.view(1, -1, 1) - top, cols.view(1, 1, -1) - left
        inside = (down >= 0) & (down < side) & (along >= 0) & (along < side)
        return _spread(inside.view_as(pixels(like)), like)


def _shrink_l1(delta: Tensor, room: Tensor, eps: float) -> Tensor:
    """The nearest point with an l1 norm of at most ``eps`` and no coordinate longer than its ``room``.

    Soft-threshold by the level at which the clipped lengths add up to ``eps``. Their sum is piecewise linear in the
    level, with a kink where a coordinate reaches 0 and one where it leaves its bound (Croce & Hein, 2021, proposition
    2.2), so that sorting the kinks finds the level exactly.
    """
    near = delta.sign() * torch.minimum(delta.abs(), room)
    over = near.abs().flatten(1).sum(1) > eps
    if not over.any():
        return near
    length, room = delta[over].abs().flatten(1).double(), room[over].flatten(1).double()
    kinks, order = torch.cat([length, (length - room).clamp_min(0)], 1).sort(1, descending=True)
    slope = torch.cat([torch.ones_like(length), -torch.ones_like(length)], 1).gather(1, order).cumsum(1)
    total = F.pad((slope[:, :-1] * (kinks[:, :-1] - kinks[:, 1:])).cumsum(1), (1, 0))
    last = (total <= eps).sum(1, keepdim=True) - 1
    level = kinks.gather(1, last) - (eps - total.gather(1, last)) / slope.gather(1, last).clamp_min(1)
    size = torch.minimum((length - level.clamp_min(0)).clamp_min(0), room)
    near[over] = delta[over].sign() * size.to(delta.dtype).view_as(delta[over])
    return near


def _extent(hit: Tensor) -> Tensor:
    """From the first to the last True of each row, both counted: (B,)."""
    place = torch.arange(hit.shape[1], device=hit.device)
    last, first = torch.where(hit, place, -1).amax(1), torch.where(hit, place, hit.shape[1]).amin(1)
    return (last - first + 1).clamp_min(0)


linf, l2, l1, l0, patch = Linf(), L2(), L1(), L0(), Patch()
NORMS: dict[str, Norm] = {norm.name: norm for norm in (linf, l2, l1, l0, patch)}
