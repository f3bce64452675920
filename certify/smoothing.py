"""Certificates by randomized smoothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.certificate import Certificate
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.papers import COHEN_2019
from robustbench_lite.registry import certifier
from robustbench_lite.smoothed import Smoothed
from robustbench_lite.threat import ThreatModel


@certifier("smoothing")
@dataclass(frozen=True)
class Smoothing:
    """Certify of Cohen, Rosenfeld & Kolter (2019, section 3.2.2, by theorem 1), on a model behind ``smoothed``.

    The vote of ``n0`` draws of noise names the class, ``n`` others bound its probability from below; each radius is
    wrong with probability at most ``alpha``. It is proved of the classifier with infinitely many draws.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    exact_radius: ClassVar[bool] = True
    bibtex: ClassVar[str] = COHEN_2019

    def __post_init__(self) -> None:
        if self.n0 < 1 or self.n < 1:
            raise ValueError(f"n0 and n must be 1 or more, not {self.n0} and {self.n}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha:g}")

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        if not isinstance(model, Smoothed):
            raise ValueError("certifier smoothing covers a smoothed classifier only; write standard+smoothed")
        if isinstance(model.model, Defended) and model.model.stochastic:
            raise ValueError("certifier smoothing counts draws of one noise; what is smoothed here has more of its own")
        vote = model.votes(x, noise.at("smoothing", "select"), self.n0).argmax(1)
        counts = model.votes(x, noise.at("smoothing", "estimate"), self.n).gather(1, vote.unsqueeze(1))[:, 0]
        lower = lower_confidence_bound(counts, self.n, self.alpha)
        radius = model.sigma * torch.special.ndtri(lower).clamp_min(0)
        # A radius that does not reach eps is of use for the label that was asked about alone.
        return Certificate.of_radius(vote, torch.where((vote == y) | (radius >= threat.eps), radius, 0), threat.eps)


def lower_confidence_bound(counts: Tensor, n: int, alpha: float) -> Tensor:
    """The least probability for which ``counts`` or more of ``n`` have a chance of ``alpha``: (B,) float64.

    Clopper & Pearson (1934), one side of it.
    """
    from scipy.stats import beta

    hits = counts.cpu().double().numpy()
    bound = torch.from_numpy(beta.ppf(alpha, hits, n - hits + 1))
    return bound.nan_to_num(0).to(counts.device)  # no hits, no bound
