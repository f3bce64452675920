"""Architectures by name."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.wording import suggest

Shape = tuple[int, ...]


def _after_convolutions(shape: Shape) -> int:
    """Positions left once height and width were halved twice."""
    return (shape[1] // 4) * (shape[2] // 4)


def _cnn(shape: Shape, classes: int, widths: tuple[int, int], hidden: int) -> nn.Module:
    first, second = widths
    return nn.Sequential(
        nn.Conv2d(shape[0], first, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * _after_convolutions(shape), hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """conv16-conv32-fc100, the MNIST net of Wong & Kolter (2018)."""
    return _cnn(shape, classes, (16, 32), 100)


def cnn_large(shape: Shape, classes: int) -> nn.Module:
    """conv32-conv64-fc256, kernels of 4 with stride 2."""
    return _cnn(shape, classes, (32, 64), 256)


def lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with ReLU, max pooling and padding: conv6-conv16-fc120-fc84."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * _after_convolutions(shape), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def mlp(shape: Shape, classes: int) -> nn.Module:
    """fc256-fc128 with ReLU, for images and plain vectors alike."""
    size = torch.Size(shape).numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, classes)
    )


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU (He et al., 2016b, figure 4e)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pre = F.relu(self.norm1(x))
        skip = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(pre)
        out: Tensor = skip + self.conv2(F.relu(self.norm2(self.conv1(pre))))
        return out


def preact_resnet18(shape: Shape, classes: int) -> nn.Module:
    """PreAct ResNet-18 for small images (He et al., 2016b), without a stem that shrinks them."""
    widths = (64, 64, 128, 256, 512)
    blocks: list[nn.Module] = []
    for stage, (width, out) in enumerate(pairwise(widths)):
        blocks += [PreActBlock(width, out, 2 if stage else 1), PreActBlock(out, out, 1)]
    return nn.Sequential(
        nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False),
        *blocks,
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


class ConvexSum(nn.Module):
    """A convex combination of two branches, whose ``weights`` (2,) are learned: it stretches no difference that the
    branches do not (Cisse et al., 2017, algorithm 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        mixed: Tensor = self.weights[0] * one + self.weights[1] * other
        return mixed

    @torch.no_grad()
    def project(self) -> None:
        """Gives the weights the nearest values that are not negative and add up to 1."""
        share = ((self.weights[0] - self.weights[1] + 1) / 2).clamp(0, 1)
        self.weights.copy_(torch.stack([share, 1 - share]))


class ConvexBlock(nn.Module):
    """Two 3x3 convolutions, each after ReLU, and a way around them, in a convex sum."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride)
        self.sum = ConvexSum()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.sum(self.shortcut(x), self.conv2(F.relu(self.conv1(F.relu(x)))))
        return out


def convex_resnet(shape: Shape, classes: int) -> nn.Module:
    """A small residual net without batch norm, whose sums are convex: conv32 and blocks of 32, 64 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 4, stride=2, padding=1),
        ConvexBlock(32, 32, 1),
        ConvexBlock(32, 64, 2),
        ConvexBlock(64, 64, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * math.ceil(shape[1] // 2 / 2) * math.ceil(shape[2] // 2 / 2), classes),
    )


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "cnn": cnn,
    "cnn-large": cnn_large,
    "convex-resnet": convex_resnet,
    "lenet": lenet,
    "mlp": mlp,
    "preact-resnet18": preact_resnet18,
}
CUSTOMARY = {"mnist": "cnn-large", "fashion-mnist": "cnn-large", "digits": "cnn", "cifar10": "preact-resnet18"}


def customary(dataset: str, shape: Shape) -> str:
    """The architecture that is used on a data set when none is named."""
    return CUSTOMARY.get(dataset, "cnn" if len(shape) == 3 and min(shape[1:]) >= 4 else "mlp")


def require(name: str) -> None:
    """Sees that an architecture exists.

    Raises:
        ValueError: where it does not.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; {suggest(name, MODELS, more=', and FILE.py:factory')}")


def build(name: str, shape: Shape, classes: int, seed: int = 0) -> nn.Module:
    """A freshly initialised model; the same seed gives the same weights, and no global random state changes.

    Raises:
        ValueError: for an unknown name, or an architecture that cannot take inputs of this shape.
    """
    require(name)
    if name != "mlp" and (len(shape) != 3 or min(shape[1:]) < 4):
        raise ValueError(f"model {name} takes images of at least 4x4 pixels, not inputs of shape {shape}; try mlp")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name](shape, classes)
