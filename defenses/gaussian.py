"""Noise augmentation, for a model that is to be smoothed."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.data import Images
from robustbench_lite.noise import Noise
from robustbench_lite.norms import l2
from robustbench_lite.papers import COHEN_2019
from robustbench_lite.registry import defense
from robustbench_lite.threat import ThreatModel
from robustbench_lite.training import Lab, Loss, Recipe


@defense("gaussian")
@dataclass(frozen=True)
class Gaussian(Recipe):
    """Cross-entropy under Gaussian noise of deviation ``sigma`` (Cohen, Rosenfeld & Kolter, 2019, section 3.3).

    Noise is drawn anew for each image in each epoch and not clipped to the pixel range: what ``smoothed`` will ask.
    While it trains, robust accuracy is measured under l2 at eps ``sigma``.
    """

    sigma: float = 0.25

    bibtex: ClassVar[str] = COHEN_2019

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise ValueError(f"sigma must be above 0, not {self.sigma:g}")

    def threat(self, data: Images) -> ThreatModel:
        return ThreatModel(l2, self.sigma)

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            logits = model(x + self.sigma * noise.normal(x))
            return F.cross_entropy(logits, y), logits

        return loss
