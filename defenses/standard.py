"""No defense: training on clean images, the row that every other is read against."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.noise import Noise
from robustbench_lite.registry import defense
from robustbench_lite.training import Lab, Loss, Recipe


@defense("standard")
@dataclass(frozen=True)
class Standard(Recipe):
    """Cross-entropy on clean images, each moved by up to ``shift`` pixels."""

    epochs: int = 12
    shift: int = 1

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            logits = model(x)
            return F.cross_entropy(logits, y), logits

        return loss
