"""The boundary attack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack
from robustbench_lite.threat import ThreatModel

CANDIDATES = 10  # that a query carries for each input, in the search for a start and in the walk
NOISE = (None,) * CANDIDATES  # starting images of a colour for each pixel
GRAINS = (None, None, None, 8, 8, 4, 4, 2, 2, 1)  # or of so many blocks a side
ATTEMPTS = 20  # at finding a start
HALVINGS = 8  # of the way from the input to each start
CONVERGED = 1e-6  # the step towards the input, relative to its distance, below which a walk ends


@attack("boundary")
@dataclass(frozen=True)
class Boundary:
    """A random walk along the boundary towards the input, by labels alone (Brendel et al., 2018, algorithm 1).

    A candidate is a random step on the sphere around the input, then a step towards it (their figure 2). The length of
    each is adapted to how often it succeeds: 30 % of the steps on the sphere, where the paper says about half, and 1 in
    8 of both together, its quarter of a half. (Along a flat boundary half succeed only as the length tends to 0.)
    Ten candidates are asked about at once, one of them without its second step, to learn the first rate.

    Starts are uniform noise, and where the model takes that for nothing else, mosaics of random colours too, from 64
    blocks down to one: ten at a time, at most 200. (A mosaic lies nearer, but most walks from one end farther away.)
    Starts know nothing of the data, so that a target may be met by none of them: such an input is given up.

    ``queries`` bounds the forwards that an input costs.
    """

    queries: int = 25_000

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimises: ClassVar[bool] = True
    version: ClassVar[int] = 2
    bibtex: ClassVar[str] = """@inproceedings{brendel2018decision,
  title     = {Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning Models},
  author    = {Wieland Brendel and Jonas Rauber and Matthias Bethge},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}"""

    def __post_init__(self) -> None:
        least = CANDIDATES * (1 + HALVINGS)
        if self.queries < least:
            raise ValueError(f"queries must be {least} or more, what a start costs, not {self.queries}")

    def __call__(self, problem: Problem) -> Tensor:
        self._start(problem)
        walk = problem[problem.distance.isfinite()]
        turn, advance = torch.full_like(walk.distance, 0.1), torch.full_like(walk.distance, 0.01)
        for step in range(self.queries // CANDIDATES):
            going = walk.open & (walk.forwards + CANDIDATES <= self.queries) & (advance > CONVERGED)
            if not going.all():
                walk, turn, advance = walk[going], turn[going], advance[going]
            if not len(walk):
                break
            hit = walk.goal.reached(walk.labels(_candidates(walk, walk.noise.at("step", step), turn, advance)))
            on_sphere, both = hit[:, 0].to(turn), hit[:, 1:].to(turn).mean(1)
            turn = (turn * torch.exp(0.1 * (on_sphere - 0.3))).clamp(max=1)
            advance = (advance * torch.exp(0.5 * (both - 0.125))).clamp(max=0.5)
        return problem.best

    def _start(self, problem: Problem) -> None:
        """Finds each input an adversarial on the boundary, or gives it up."""
        for attempt in range(min(ATTEMPTS, self.queries // CANDIDATES - HALVINGS)):
            seeking = problem[problem.open & problem.distance.isinf()]
            if not len(seeking):
                return
            grains = GRAINS if attempt else NOISE
            starts = _mosaics(seeking.noise.at("start", attempt), seeking.x, seeking.threat, grains)
            seeking.labels(starts)
            found = seeking.distance.isfinite()
            _bisect(seeking[found], starts[found])
        problem.give_up(problem.distance.isinf(), "no start found")


def _mosaics(noise: Noise, x: Tensor, threat: ThreatModel, grains: Sequence[int | None]) -> Tensor:
    """An image of random blocks for every grain, how many a side (None: pixels): (B, K, ...)."""
    planes = x if x.dim() == 4 else x.flatten(1)[:, None, None]
    images = []
    for k, grain in enumerate(grains):
        sides = [min(grain or side, side) for side in planes.shape[2:]]
        blocks = noise.at(k).uniform(planes.new_empty(*planes.shape[:2], *sides))
        images.append(F.interpolate(blocks, planes.shape[2:]).view_as(x))
    return threat.lower + (threat.upper - threat.lower) * torch.stack(images, 1)


def _bisect(problem: Problem, starts: Tensor) -> None:
    """Asks about points ever nearer to the boundary, between the input and each of its ``starts`` (B, K, ...)."""
    x = problem.x.unsqueeze(1)
    way = starts - x
    low = starts.new_zeros(*starts.shape[:2], *[1] * (x.dim() - 2))
    high = torch.ones_like(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        hit = problem.goal.reached(problem.labels(x + middle * way)).view_as(low)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)


def _candidates(walk: Problem, noise: Noise, turn: Tensor, advance: Tensor) -> Tensor:
    """Points around the nearest adversarial, (B, K, ...): the first as far from the input, the others nearer."""
    x, count = walk.x.flatten(1).unsqueeze(1), walk.x[0].numel()
    apart = max(1, count // CANDIDATES)
    # Windows of one stream, far enough apart to have little in common, each a normal direction of its own.
    stream = noise.normal(x.new_empty(len(x), count + (CANDIDATES - 1) * apart))
    turned = stream.unfold(1, count, apart) * (turn * walk.distance / count**0.5).view(-1, 1, 1)
    turned = turned.add_(walk.best.flatten(1).unsqueeze(1)).clamp_(walk.threat.lower, walk.threat.upper).sub_(x)
    wanted = (walk.distance * (1 - advance)).unsqueeze(1).repeat(1, CANDIDATES)
    wanted[:, 0] = walk.distance
    length = torch.linalg.vector_norm(turned, dim=2).clamp_min(1e-12)
    turned = turned.mul_((wanted / length).unsqueeze(2)).add_(x).clamp_(walk.threat.lower, walk.threat.upper)
    return turned.view(len(x), CANDIDATES, *walk.x.shape[1:])
