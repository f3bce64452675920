"""Small models whose answers and exact distances are known, and inputs for them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise

DUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda w: w.abs().sum(-1),
    "l2": lambda w: w.square().sum(-1).sqrt(),
    "l1": lambda w: w.abs().amax(-1),
}


class Linear(nn.Module):
    """Logits ``x @ weight.T + bias`` of flattened inputs."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = x.flatten(1) @ self.weight.T + self.bias
        return logits


class Halfspace(NamedTuple):
    model: Linear
    x: Tensor
    y: Tensor

    def across(self, x: Tensor, distance: float) -> Tensor:
        """``x`` moved towards the other class along the normal, the l2 way."""
        normal = self.model.weight[1] - self.model.weight[0]
        side = self.model(x).argmax(1).mul(-2).add(1).to(x).view(-1, *[1] * (x.dim() - 1))
        moved: Tensor = x + distance * side * (normal / normal.norm()).view(x.shape[1:])
        return moved.detach()


def corner_gains(way: Tensor, x: Tensor) -> Tensor:
    """How much the best colour in [0, 1] of each pixel adds to ``way * x``, largest first: (B, pixels)."""
    colours = torch.where(way > 0, 1.0, 0.0).to(x) - x
    gains = (way * colours).sum(1) if x.dim() == 4 else way * colours
    return gains.flatten(1).sort(1, descending=True).values


def halfspace(
    norm: str,
    distance: float,
    count: int = 20,
    shape: tuple[int, ...] = (1, 10, 10),
    dtype: torch.dtype = torch.float32,
) -> Halfspace:
    """Two classes, and inputs that all lie exactly ``distance`` from the boundary, on either side in turn.

    The pixel range does not bind: inputs and nearest adversarials lie well inside. Under l0 it does, and a ``distance``
    of 1.25 takes all that the best pixel can give and a quarter of what the next can.
    """
    random = torch.Generator().manual_seed(sum(shape))
    size = torch.Size(shape).numel()
    w = (0.5 + 0.5 * torch.rand(size, generator=random, dtype=torch.float64)) * torch.where(
        torch.rand(size, generator=random) < 0.5, -1.0, 1.0
    )
    w[size // 2] = 2.0
    x = 0.4 + 0.2 * torch.rand(count, size, generator=random, dtype=torch.float64)
    y = torch.arange(count) % 2
    side = 2 * y - 1
    for _ in range(60 if norm == "l0" else 1):  # under l0 what is wanted depends on where x has moved
        if norm == "l0":
            gains = corner_gains((-side.unsqueeze(1) * w).view(count, *shape), x.view(count, *shape))
            shares = (distance - torch.arange(gains.shape[1])).clamp(0, 1)
            wanted = side * (gains * shares).sum(1)
        else:
            wanted = side * distance * DUAL[norm](w)
        x += ((wanted - (x - 0.5) @ w) / w.square().sum()).unsqueeze(1) * w
    model = Linear(torch.stack([-w / 2, w / 2]), torch.stack([w.sum() / 4, -w.sum() / 4]))
    assert x.min() > 0.02
    assert x.max() < 0.98
    return Halfspace(model.to(dtype), x.view(count, *shape).to(dtype), y)


def many_classes(classes: int, count: int, size: int = 30) -> tuple[Linear, Tensor, Tensor]:
    """A random linear model, and inputs with the labels that it gives them."""
    random = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, size, generator=random)
    model = Linear(weight, -weight.sum(1) / 2)
    x = 0.3 + 0.4 * torch.rand(count, size, generator=random)
    return model, x, model(x).argmax(1)


def nearest(model: Linear, x: Tensor, norm: str) -> Tensor:
    """How far each input (B, D) of a linear model is from the nearest other class; only l0 minds the pixel range."""
    logits = model(x)
    label = logits.argmax(1, keepdim=True)
    ways = model.weight - model.weight[label]
    gap = logits.gather(1, label) - logits
    if norm == "l0":
        gains = [corner_gains(way, x).cumsum(1) for way in ways.unbind(1)]
        distance = torch.stack([(gain < gap[:, [k]]).sum(1) + 1 for k, gain in enumerate(gains)], 1).to(gap)
    else:
        distance = gap / DUAL[norm](ways)
    return distance.scatter(1, label, torch.inf).amin(1).detach()


def convolutional(
    count: int, classes: int = 4, low: float = 0.0, high: float = 1.0, sharpness: float = 1.0
) -> tuple[nn.Module, Tensor, Tensor]:
    """A random convolutional net on 1x8x8, and inputs in [low, high] with the labels that it gives them."""
    random = torch.Generator().manual_seed(3)
    last = nn.Linear(54, classes)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), last).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
    x = low + (high - low) * torch.rand(count, 1, 8, 8, generator=random)
    with torch.no_grad():
        centre = net(x).mean(0)
        last.bias.sub_(centre).mul_(sharpness)
        last.weight.mul_(sharpness)
        return net, x, net(x).argmax(1)


class Guarded(Defended):
    """A model with a detector that rejects where ``way . x`` exceeds ``level``."""

    def __init__(self, model: nn.Module, way: Tensor, level: float) -> None:
        super().__init__(model)
        self.way, self.level = nn.Parameter(way), level

    def rejection(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return x.flatten(1) @ self.way - self.level


GUARDED = {"linf": 0.25, "l2": (0.2**2 + 0.25**2) ** 0.5, "l1": 0.45}


def guarded(count: int = 12) -> tuple[Guarded, Tensor, Tensor]:
    """Class 1 where x0 > 0.5, rejected where 2 x0 - x1 > 0.45, inputs at (0.3, 0.3, anything).

    The nearest adversarial (0.5, 0.3) is rejected; the nearest that is not is (0.5, 0.55), at a distance ``GUARDED``.
    """
    model = Linear(torch.tensor([[-2.0, 0, 0], [2.0, 0, 0]]), torch.tensor([1.0, -1.0]))
    x = torch.full((count, 3), 0.3)
    x[:, 2] = torch.linspace(0.3, 0.7, count)
    return Guarded(model, torch.tensor([2.0, -1.0, 0.0]), 0.45), x, torch.zeros(count, dtype=torch.long)


class Brittle(nn.Module):
    """Says nothing, or raises, of every input but those that it ``knows``; two classes."""

    def __init__(self, knows: Tensor, raises: bool = False) -> None:
        super().__init__()
        self.knows, self.raises = knows, raises

    def forward(self, x: Tensor) -> Tensor:
        known = (x.unsqueeze(1) == self.knows).all(2).any(1, keepdim=True)
        if self.raises and not known.all():
            raise RuntimeError("this model raises")
        return torch.stack([x.sum(1), 0.2 - x.sum(1)], 1) / known


class Watched(nn.Module):
    """Notes whether anyone has followed its gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.followed = model, False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._note)
        return logits

    def _note(self, gradient: Tensor) -> None:
        self.followed = True


class Flattened(Defended):
    """A model with a surrogate that is ten times as flat: who goes by it takes distances for ten times as long."""

    def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        logits = self.within(x, noise)
        return 0.9 * logits.detach() + 0.1 * logits


class Coarse(Defended):
    """Shifts all pixels together at random and rounds them to a few levels: declared to be both."""

    stochastic = True
    draws = 3

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.within(((x + self._shift(x, noise)) * 15).round() / 15, noise)

    def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.within(x + self._shift(x, noise), noise)

    def _shift(self, x: Tensor, noise: Noise | None) -> Tensor:
        if noise is None:
            raise ValueError("a stochastic defense was asked without noise")
        return 0.1 * noise.at("shift").normal(x.flatten(1)[:, :1]).view(-1, *[1] * (x.dim() - 1))
