"""Feature squeezing: predictions on squeezed inputs, or a detector of inputs that squeezing changes too much."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.defended import Defended, straight_through
from robustbench_lite.noise import Noise
from robustbench_lite.registry import defense
from robustbench_lite.training import Lab

IMAGES = 5000  # training images on which a threshold is measured
BATCH = 250  # of them at once
PATCH, REACH = 3, 5  # side of the patches that non-local means compares; how far away they lie at most
CUT = 5.0  # distance between patches, without their last row, beyond which they have no weight: scikit-image's

Squeezer = Callable[[Tensor], Tensor]


@defense("feature-squeezing")
@dataclass(frozen=True)
class FeatureSqueezing:
    """Squeezes inputs by each of its squeezers that is not none (Xu, Evans & Qi, 2018, section III).

    ``bits`` a pixel; the median of a ``median`` x ``median`` window; non-local means of ``strength``, in units of the
    pixel range. The model answers to what all of them, one after the other, leave of an input. With ``detect`` it
    answers to the input itself, which is rejected where for any squeezer alone the softmax outputs of the input and of
    what it leaves are further apart, in l1, than a threshold (section V): that which rejects ``fpr`` of the clean
    training images, correctly classified or not.

    Attacks see a bit depth as the identity, and the others' own gradients.
    """

    bits: int | None = 1
    median: int | None = 2
    strength: float | None = None
    detect: bool = False
    fpr: float = 0.05

    trains: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@inproceedings{xu2018feature,
  title     = {Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks},
  author    = {Weilin Xu and David Evans and Yanjun Qi},
  booktitle = {Network and Distributed Systems Security Symposium},
  year      = {2018}
}"""

    def __post_init__(self) -> None:
        if not self.squeezers:
            raise ValueError("there is nothing to squeeze by: give bits, median or strength")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits}")
        if self.median is not None and self.median < 2:
            raise ValueError(f"median must be 2 or more, not {self.median}")
        if self.strength is not None and not self.strength > 0:
            raise ValueError(f"strength must be above 0, not {self.strength:g}")
        if not 0 < self.fpr < 1:
            raise ValueError(f"fpr must be between 0 and 1, not {self.fpr:g}")

    @property
    def squeezers(self) -> list[Squeezer]:
        bits = [] if self.bits is None else [partial(bit_depth, by=self.bits)]
        medians = [] if self.median is None else [partial(median, by=self.median)]
        means = [] if self.strength is None else [partial(non_local_means, by=self.strength)]
        return [*bits, *medians, *means]

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        if not self.detect:
            return Squeezed(model, self.squeezers).eval()
        detector = Detector(model, self.squeezers).eval().to(lab.device)
        noise = lab.noise.at("feature-squeezing")
        rows = noise.permutation(torch.empty(1, len(lab.data)))[0, :IMAGES]
        with torch.no_grad():
            pieces = [(lab.data.x[some].to(lab.device), noise.over(some)) for some in rows.split(BATCH)]
            distances = torch.cat([detector.distance(*piece) for piece in pieces])
        detector.limit.copy_(threshold(distances, self.fpr))
        return detector


def threshold(distances: Tensor, fpr: float) -> Tensor:
    """The least of ``distances`` (N,) that no more than the share ``fpr`` of them exceeds."""
    return distances.sort().values[math.ceil(round(len(distances) * (1 - fpr), 6)) - 1]


class Squeezed(Defended):
    """What the model says of squeezed inputs."""

    def __init__(self, model: nn.Module, squeezers: list[Squeezer]) -> None:
        super().__init__(model)
        self.squeezers = squeezers

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        for squeeze in self.squeezers:
            x = squeeze(x)
        return self.within(x, noise)


class Detector(Defended):
    """Rejects inputs of which the model says something else once they are squeezed."""

    limit: Tensor

    def __init__(self, model: nn.Module, squeezers: list[Squeezer]) -> None:
        super().__init__(model)
        self.squeezers = squeezers
        self.register_buffer("limit", torch.tensor(0.0))

    def distance(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The largest l1 distance between softmax outputs, (B,): equation 2."""
        whole = self(x, noise).softmax(1)
        apart = [(whole - self(squeeze(x), noise).softmax(1)).abs().sum(1) for squeeze in self.squeezers]
        return torch.stack(apart).amax(0)

    def rejection(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.distance(x, noise) - self.limit

    @property
    def threshold(self) -> float:
        return float(self.limit)


def bit_depth(x: Tensor, by: int) -> Tensor:
    """``by`` bits a pixel; as differentiable as the identity."""
    levels = 2**by - 1
    return straight_through((x * levels).round() / levels, x)


def median(x: Tensor, by: int) -> Tensor:
    """The median of the window of side ``by`` around each pixel of images (B, C, H, W), mirrored at their edges.

    Of an even number of values it is the upper of the middle two; a window of even side reaches further up and left.
    """
    for axis in (2, 3):
        x = mirrored(x, axis, by // 2, (by - 1) // 2)
    windows = x.unfold(2, by, 1).unfold(3, by, 1).flatten(4)
    return -(-windows).median(4).values  # torch takes the lower one


def mirrored(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """``x`` continued along an axis by its mirror image, the edge included."""
    size = x.shape[axis]
    index = torch.arange(-before, size + after, device=x.device) % (2 * size)
    return x.index_select(axis, torch.minimum(index, 2 * size - 1 - index))


def non_local_means(x: Tensor, by: float) -> Tensor:
    """The mean of the pixels nearby, weighted by how alike the patches around them are (Buades et al., 2005).

    A patch's pixels count by a Gaussian; squared distances are in units of the strength ``by``, squared.
    """
    half, height, width = PATCH // 2, *x.shape[2:]
    line = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-(line.square().unsqueeze(1) + line.square()) / (2 * ((PATCH - 1) / 4) ** 2))
    kernel = (kernel / (kernel.sum() * x.shape[1] * by**2))[None, None]
    padded = F.pad(x, (half, half, half, half), mode="reflect")
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    down, along = min(REACH, height - 1), min(REACH, width - 1)
    for i, j in product(range(-down, down + 1), range(-along, along + 1)):
        top, bottom, left, right = max(0, -i), height - max(0, i), max(0, -j), width - max(0, j)
        here = padded[..., top : bottom + 2 * half, left : right + 2 * half]
        there = padded[..., top + i : bottom + i + 2 * half, left + j : right + j + 2 * half]
        square = (here - there).square().sum(1, keepdim=True)
        weight = torch.exp(-F.conv2d(square, kernel))
        far = F.conv2d(square[:, :, :-1], kernel[:, :, :-1]) > CUT
        weight = weight.masked_fill(far, 0)
        total[..., top:bottom, left:right] += weight * x[..., top + i : bottom + i, left + j : right + j]
        weights[..., top:bottom, left:right] += weight
    return total / weights
