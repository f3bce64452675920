"""Adversarial training."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, customary_length, input_gradient
from robustbench_lite.noise import Noise
from robustbench_lite.papers import MADRY_2018
from robustbench_lite.registry import defense
from robustbench_lite.threat import Goal
from robustbench_lite.training import AdversarialRecipe, Lab, Loss


@defense("madry")
@dataclass(frozen=True)
class Madry(AdversarialRecipe):
    """Trains on what PGD makes of every batch (Madry et al., 2018, equation 2.1).

    ``eps`` rises from 0 over the first ``warmup`` epochs, without which training at 0.3 stays at chance; none stands
    for the data set's customary eps. A step of the attack has length 2.5 eps / steps.
    """

    steps: int = 8

    bibtex: ClassVar[str] = MADRY_2018

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            threat = self.threat_at(epoch)
            start, length = threat.sample(noise, x), customary_length(threat.eps, self.steps)
            logits = model(ascend(input_gradient(model, Goal(y).cross_entropy), start, x, threat, self.steps, length))
            return F.cross_entropy(logits, y), logits

        return loss
