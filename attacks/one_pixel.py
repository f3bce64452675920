"""The one-pixel attack: a few pixels of any colour, found by differential evolution."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import ThreatModel

AT_ONCE = 2**24  # bytes of candidate images that exist at a time (one input's, where those are more)


@attack("one-pixel")
@dataclass(frozen=True)
class OnePixel:
    """Differential evolution of eps pixels, each a place and a colour (Su et al., 2019, section III).

    An input gets ``population`` candidates, then as many children in each of ``generations``; ``scale`` is F of
    equation 3, and ``base`` what a child starts from: a random other, as in the paper, or the fittest, which finds more
    in few generations. The fitness ranks as the paper's does: the probability of the target, or of anything but the
    true label.
    An input is done once its label has changed, which is never later than the paper's stop at a probability of 90 %.
    """

    population: int = 400
    generations: int = 100
    scale: float = 0.5
    base: Literal["random", "best"] = "random"

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    bibtex: ClassVar[str] = """@article{su2019one,
  title   = {One Pixel Attack for Fooling Deep Neural Networks},
  author  = {Jiawei Su and Danilo Vasconcellos Vargas and Kouichi Sakurai},
  journal = {IEEE Transactions on Evolutionary Computation},
  volume  = {23},
  number  = {5},
  pages   = {828--841},
  year    = {2019}
}"""

    def __post_init__(self) -> None:
        if self.population < 4:
            raise ValueError(f"population must be 4 or more, not {self.population}: a child has three other parents")
        if self.generations < 0:
            raise ValueError(f"generations must be 0 or more, not {self.generations}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, not {self.scale:g}")

    def __call__(self, problem: Problem) -> Tensor:
        whole = problem
        genes = first_generation(problem, self.population)
        fitness = score(problem, genes)
        for generation in range(self.generations):
            still = problem.open
            if not still.any():
                break
            problem, genes, fitness = problem[still], genes[still], fitness[still]
            noise = problem.noise.at("generation", generation)
            genes, fitness = evolve(genes, fitness, partial(score, problem), noise, self.scale, self.base == "best")
        still = problem.open
        fittest = fitness[still].argmax(1).view(-1, 1, 1, 1)
        x = whole.best
        x[whole.open] = paint(problem[still].x, genes[still].take_along_dim(fittest, 1), problem.threat)[:, 0]
        return x


def evolve(
    parents: Tensor,
    fitness: Tensor,
    score: Callable[[Tensor], Tensor],
    noise: Noise,
    scale: float,
    from_best: bool = False,
) -> tuple[Tensor, Tensor]:
    """One generation of rand/1, or best/1, without crossover (Storn & Price, 1997): each parent meets one child, the
    fitter stays.

    ``parents`` is (B, K, ...) in [0, 1], ``fitness`` (B, K), the higher the fitter.
    """
    first, second, third = mates(fitness, noise)
    if from_best:
        first = fitness.argmax(1, keepdim=True).expand_as(first)
    first, second, third = (parents.take_along_dim(_as(mate, parents), 1) for mate in (first, second, third))
    children = (first + scale * (second - third)).clamp(0, 1)
    theirs = score(children)
    wins = theirs >= fitness
    return torch.where(_as(wins, parents), children, parents), torch.where(wins, theirs, fitness)


def mates(like: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """For each of K members three others, all different, every choice as likely: (B, K) each."""
    count = like.shape[1]
    one, two, three = (noise.at("mate", k).integers(count - 1 - k, like) for k in range(3))  # steps ahead, less one
    two = two + (two >= one)
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    three = three + (three >= low)
    three = three + (three >= high)
    ahead = torch.arange(1, count + 1, device=like.device)
    return (one + ahead) % count, (two + ahead) % count, (three + ahead) % count


def first_generation(problem: Problem, population: int) -> Tensor:
    """Genes in [0, 1], (B, population, pixels, places + channels): places uniform, colours normal (section III-C)."""
    x, threat = problem.x, problem.threat
    grid, channels = planes(x)
    count = int(min(threat.norm.limit(threat.eps, x), grid.numel()))
    like = x.new_empty(len(x), population, count, 1)
    noise = problem.noise.at("first")
    places = noise.at("place").uniform(like.expand(-1, -1, -1, len(grid)))
    colours = 0.5 + 0.5 * noise.at("colour").normal(like.expand(-1, -1, -1, channels))
    return torch.cat([places, colours.clamp(0, 1)], 3)


def score(problem: Problem, genes: Tensor) -> Tensor:
    """How near each candidate is to the goal, (B, K): the log of the paper's fitness; minus infinity for NaN."""
    size = max(1, AT_ONCE // (genes.shape[1] * problem.x[0].numel() * problem.x.element_size()))
    found = []
    for rows in torch.arange(len(problem), device=genes.device).split(size):
        part = problem[rows]
        found.append(part.goal.cross_entropy(part.logits(paint(part.x, genes[rows], part.threat))))
    return torch.cat(found).nan_to_num(nan=-torch.inf)


def paint(x: Tensor, genes: Tensor, threat: ThreatModel) -> Tensor:
    """Each input with the pixels of each of its candidates set: (B, K, ...)."""
    grid, channels = planes(x)
    painted = x.unsqueeze(1).repeat(1, genes.shape[1], *[1] * (x.dim() - 1))
    flat = painted.view(*genes.shape[:2], channels, -1)
    for pixel in genes.unbind(2):  # one after the other: where two meet, the later stays
        place = torch.zeros_like(pixel[..., 0], dtype=torch.int64)
        for length, gene in zip(grid, pixel.unbind(-1)):
            place = place * length + (gene * length).long().clamp(max=length - 1)
        colour = threat.lower + (threat.upper - threat.lower) * pixel[..., len(grid) :]
        flat.scatter_(3, place[..., None, None].expand(-1, -1, channels, 1), colour.unsqueeze(-1))
    return painted


def planes(x: Tensor) -> tuple[torch.Size, int]:
    """The grid of pixels, and how many channels each has."""
    return (x.shape[2:], x.shape[1]) if x.dim() == 4 else (x.shape[1:], 1)


def _as(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B, K) shaped to broadcast against ``like`` (B, K, ...)."""
    return values.view(*values.shape, *[1] * (like.dim() - 2))
