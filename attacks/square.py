"""Square attack: random search over squares of the image."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import by_row
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import ThreatModel

LEG = 100  # queries between two looks at which inputs are still open
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # after these queries, where there are 10,000 of them
PLACES = 5  # numbers drawn for a query beside a sign for each channel


@attack("square")
@dataclass(frozen=True)
class Square:
    """Tries squares of random sign in random places and keeps what raises the margin (Andriushchenko et al., 2020).

    Algorithms 1, 2 (linf) and 3 (l2). ``p`` is the share of the image that the first square covers; it shrinks as the
    ``queries`` are spent. A vector is an image of one row: a side that does not fit is made up for by the other.
    """

    queries: int = 5000
    p: float = 0.8

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    bibtex: ClassVar[str] = """@inproceedings{andriushchenko2020square,
  title     = {Square Attack: a query-efficient black-box adversarial attack via random search},
  author    = {Maksym Andriushchenko and Francesco Croce and Nicolas Flammarion and Matthias Hein},
  booktitle = {European Conference on Computer Vision},
  year      = {2020}
}"""

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError("queries must be 1 or more")
        if not 0 < self.p <= 1:
            raise ValueError(f"p must lie in (0, 1], not {self.p:g}")

    def __call__(self, problem: Problem) -> Tensor:
        best = START[problem.threat.norm.name](problem)
        top = margin(problem, best)
        for first in range(1, self.queries, LEG):
            working = problem.open
            if not working.any():
                break
            leg = range(first, min(first + LEG, self.queries))
            best[working], top[working] = self._search(problem[working], best[working], top[working], leg)
        return best

    def _search(self, problem: Problem, best: Tensor, top: Tensor, leg: range) -> tuple[Tensor, Tensor]:
        """Best point and margin of each input after the queries of ``leg``."""
        propose, x = PROPOSE[problem.threat.norm.name], problem.x
        draws = problem.noise.at("query", leg.start).uniform(x.new_empty(len(x), len(leg), PLACES + frame(x)[0]))
        for query, draw in zip(leg, draws.unbind(1)):
            tried = propose(problem.threat, x, best, share(query, self.queries, self.p), draw)
            value = margin(problem, tried)
            best = torch.where(by_row(value > top, x), tried, best)
            top = torch.maximum(value, top)
        return best, top


def share(query: int, queries: int, p: float) -> float:
    """The share of the image that a square covers at ``query`` (section 4, the schedule of 10,000 rescaled)."""
    return p * 0.5 ** sum(10_000 * query // queries > after for after in HALVINGS)


def margin(problem: Problem, x: Tensor) -> Tensor:
    """What the search raises, (B,); -inf where it is no number."""
    return problem.goal.margin(problem.logits(x)).nan_to_num(nan=-torch.inf, posinf=-torch.inf)


def stripes(problem: Problem) -> Tensor:
    """A start of vertical stripes of height eps, one sign a column and channel."""
    x, threat = problem.x, problem.threat
    channels, _, columns = frame(x)
    signs = problem.noise.at("start").signs(x.new_empty(len(x), channels, 1, columns))
    return threat.project(x + threat.eps * signs.expand(-1, *frame(x)).reshape(x.shape), x)


def recolour(threat: ThreatModel, x: Tensor, best: Tensor, share: float, draw: Tensor) -> Tensor:
    """A square of ``x`` plus or minus eps, a sign a channel; the other signs where that would change nothing."""
    channels, rows, columns = frame(x)
    clean, tried = (image.flatten(1).view(len(x), channels, -1) for image in (x, best.clone()))
    window = place(draw[:, 0:2], extent(share, rows, columns), x)
    base, old = clean.gather(2, window), tried.gather(2, window)
    change = threat.eps * signs(draw)
    new, other = ((base + way).clamp(threat.lower, threat.upper) for way in (change, -change))
    idle = ((new - old).abs() < 1e-7).flatten(1).all(1)
    return tried.scatter_(2, window, torch.where(by_row(idle, old), other, new)).view_as(x)


def tiles(problem: Problem) -> Tensor:
    """A start of 5 x 5 dipoles of random sign, scaled to eps."""
    x, threat = problem.x, problem.threat
    channels, rows, columns = frame(x)
    across = (min(5, rows), min(5, columns))
    size = (rows // across[0], columns // across[1])
    chosen = problem.noise.at("start").signs(x.new_empty(len(x), channels, *across))
    chosen = chosen.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    change = x.new_zeros(len(x), channels, rows, columns)
    top, left = (rows - chosen.shape[2]) // 2, (columns - chosen.shape[3]) // 2
    change[:, :, top : top + chosen.shape[2], left : left + chosen.shape[3]] = chosen * dipoles(
        *size, x.dtype, x.device
    )[0].repeat(across)
    return threat.project(x + threat.eps * threat.norm.steepest(change.reshape(x.shape)), x)


def shift(threat: ThreatModel, x: Tensor, best: Tensor, share: float, draw: Tensor) -> Tensor:
    """The change of two squares gathered in the first of them, bent towards a dipole, with what eps has left."""
    channels, rows, columns = frame(x)
    change = (best - x).view(len(x), channels, -1)
    spare = (threat.eps**2 - change.square().sum((1, 2), keepdim=True)).clamp_min(0) / channels
    size = extent(share, rows, columns, odd=True)
    first, second = place(draw[:, 0:2], size, x), place(draw[:, 2:4], size, x)
    old = change.gather(2, first)
    mass = old.square().sum(2, keepdim=True)
    change.scatter_(2, first, 0)
    mass = mass + change.gather(2, second).square().sum(2, keepdim=True)
    change.scatter_(2, second, 0)
    upright, sideways = (shape.flatten() for shape in dipoles(*size, x.dtype, x.device))
    bump = torch.where(draw[:, 4:5] < 0.5, upright, sideways).unsqueeze(1) * signs(draw)
    change.scatter_(2, first, unit(bump + unit(old)) * (mass + spare).sqrt())
    return threat.project(x + change.view_as(x), x)


START = {"linf": stripes, "l2": tiles}
PROPOSE = {"linf": recolour, "l2": shift}


def frame(x: Tensor) -> tuple[int, int, int]:
    """Channels, rows and columns; a vector is one row."""
    return (x.shape[1], x.shape[2], x.shape[3]) if x.dim() == 4 else (1, 1, x[0].numel())


def extent(share: float, rows: int, columns: int, odd: bool = False) -> tuple[int, int]:
    """Height and width of the square that covers ``share`` of an image; for l2 of an odd side, 3 or more."""
    side = max(1, round(math.sqrt(share * rows * columns)))
    if odd:
        side = max(3, side + 1 - side % 2)
    height, width = min(side, rows), min(side, columns)
    if side > rows:
        width = min(columns, max(width, round(share * rows * columns / height)))
    elif side > columns:
        height = min(rows, max(height, round(share * rows * columns / width)))
    return height, width


def place(draw: Tensor, size: tuple[int, int], x: Tensor) -> Tensor:
    """The pixels, counted row by row, of a window of ``size`` at a random place: (B, C, height * width)."""
    channels, rows, columns = frame(x)
    top, left = ((draw[:, i : i + 1] * (n - size[i] + 1)).long() for i, n in enumerate((rows, columns)))
    down, along = (torch.arange(n, device=x.device) for n in size)
    pixels = top * columns + left + (down.unsqueeze(1) * columns + along).flatten()
    return pixels.unsqueeze(1).expand(-1, channels, -1)


def signs(draw: Tensor) -> Tensor:
    """A sign for each channel: (B, C, 1)."""
    return torch.where(draw[:, PLACES:, None] < 0.5, -1.0, 1.0).to(draw.dtype)


@lru_cache(maxsize=64)
def dipoles(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two bumps of opposite sign and together of length 1, above each other and beside each other: (height, width)."""
    upright, turned = (dipole(*size).to(device, dtype) for size in ((height, width), (width, height)))
    return upright, turned.T


def dipole(height: int, width: int) -> Tensor:
    upper = height // 2
    both = torch.cat([bump(upper, width), -bump(height - upper, width)])
    scaled: Tensor = both / both.norm()
    return scaled


def bump(height: int, width: int) -> Tensor:
    """A pyramid of squares that rises towards the middle (equation 2 of section 3.4)."""
    if height < width:
        return bump(width, height).T
    n = height // 2
    rises = (torch.arange(n + 1, 0, -1).double() ** -2).cumsum(0)
    down, along = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    return rises[n - torch.maximum(down.unsqueeze(1), along)]


def unit(change: Tensor) -> Tensor:
    """Every channel scaled to length 1; zero where it is zero."""
    scaled: Tensor = change / change.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return scaled
