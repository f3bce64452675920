"""A universal patch, trained once and pasted over every input."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack


@attack("patch")
@dataclass(frozen=True)
class Patch:
    """One patch for all inputs, which covers a share eps of each (Brown et al., 2017, equation 1).

    Trained by Adam on keyed training ``images``, a random place, ``turn`` (at most so many degrees) and size (from
    ``smallest`` to 1 times what eps allows) for each; judged at others. What a turn moves out of its square is cut off.
    """

    shape: Literal["square", "circle"] = "square"
    steps: int = 500
    batch: int = 128
    images: int = 2000
    rate: float = 0.05  # of the pixel range
    smallest: float = 0.9
    turn: float = 20.0
    learned: Tensor | None = field(default=None, compare=False, repr=False)  # (C, h, w)

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"patch"})
    bibtex: ClassVar[str] = """@article{brown2017adversarial,
  title   = {Adversarial Patch},
  author  = {Tom B. Brown and Dandelion Man{\\'e} and Aurko Roy and Mart{\\'i}n Abadi and Justin Gilmer},
  journal = {arXiv preprint arXiv:1712.09665},
  year    = {2017}
}"""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.images < 1:
            raise ValueError("steps, batch and images must be 1 or more")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be above 0 and finite, not {self.rate:g}")
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest must be above 0 and at most 1, not {self.smallest:g}")
        if not 0 <= self.turn <= 180:
            raise ValueError(f"turn must be 0 to 180 degrees, not {self.turn:g}")

    def fit(self, problem: Problem) -> "Patch":
        """This attack with a patch that reaches the goal on as many inputs of ``problem`` as it can."""
        lower, upper = problem.threat.lower, problem.threat.upper
        patch = problem.x.new_full(window(problem), (lower + upper) / 2).requires_grad_()
        optimiser = torch.optim.Adam([patch], self.rate * (upper - lower), maximize=True)
        for step, rows in enumerate(islice(_batches(problem, self.batch), self.steps if patch.numel() else 0)):
            part = problem[rows]
            with torch.enable_grad():
                pasted = self.paste(patch, part.x, part.noise.at("step", step))
            gradient, _ = part.gradient(pasted)
            (patch.grad,) = torch.autograd.grad(pasted, patch, gradient.nan_to_num(0, 0, 0))
            optimiser.step()
            patch.data.clamp_(lower, upper)
        return replace(self, learned=patch.detach())

    def __call__(self, problem: Problem) -> Tensor:
        if self.learned is None or self.learned.shape != window(problem):
            shape = None if self.learned is None else tuple(self.learned.shape)
            raise ValueError(f"the patch learned has shape {shape}, not {window(problem)}: fit it for this threat")
        x = self.paste(self.learned.to(problem.x), problem.x, problem.noise)
        problem.labels(x)
        return x

    def paste(self, patch: Tensor, x: Tensor, noise: Noise) -> Tensor:
        """``x`` (B, ...) under ``patch`` (C, h, w), at a keyed place, size and turn for each input."""
        if not patch.numel():
            return x
        images = _images(x)
        (high, wide), (height, width) = patch.shape[1:], images.shape[2:]
        down, along, size, turn = noise.uniform(x.new_empty(len(x), 4)).view(-1, 4, 1, 1).unbind(1)
        size = self.smallest + (1 - self.smallest) * size
        turn = math.radians(self.turn if min(high, wide) > 1 else 0) * (2 * turn - 1)
        rows = torch.arange(height, device=x.device).view(1, -1, 1) - (down * (height - high + 1)).floor()
        columns = torch.arange(width, device=x.device).view(1, 1, -1) - (along * (width - wide + 1)).floor()
        square = ((rows >= 0) & (rows < high)) & ((columns >= 0) & (columns < wide))
        v, u = rows - (high - 1) / 2, columns - (wide - 1) / 2  # from the centre of the square, in pixels
        grid = torch.stack(
            [
                (turn.cos() * u + turn.sin() * v) / (size * wide / 2),
                (turn.cos() * v - turn.sin() * u) / (size * high / 2),
            ],
            dim=-1,
        )  # from the centre of the patch, its edges at -1 and 1
        distance = grid.abs().amax(-1) if self.shape == "square" else grid.square().sum(-1)
        sampled = F.grid_sample(patch.expand(len(x), *patch.shape), grid, padding_mode="border", align_corners=False)
        return images.lerp(sampled, (square & (distance <= 1)).unsqueeze(1).to(x)).view_as(x)


def window(problem: Problem) -> tuple[int, int, int]:
    """Channels, height and width of the patch that the threat model allows."""
    channels, height, width = _images(problem.x).shape[1:]
    side = problem.threat.norm.limit(problem.threat.eps, problem.x)
    return channels, int(min(side, height)), int(min(side, width))


def _images(x: Tensor) -> Tensor:
    """(B, C, H, W); a vector is an image of one row."""
    return x if x.dim() == 4 else x.view(len(x), 1, 1, -1)


def _batches(problem: Problem, size: int) -> Iterator[Tensor]:
    """Positions of all inputs, in an order of its own each time round, without end."""
    for time in count():
        order = problem.noise[:1].at("order", time).permutation(problem.x.new_empty(1, len(problem)))
        yield from order[0].split(size)
