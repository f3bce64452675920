"""Adversarial training at twice the price of standard training."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, input_gradient
from robustbench_lite.noise import Noise
from robustbench_lite.registry import defense
from robustbench_lite.threat import Goal
from robustbench_lite.training import AdversarialRecipe, Lab, Loss


@defense("fast")
@dataclass(frozen=True)
class Fast(AdversarialRecipe):
    """Trains on one step of 1.25 eps from a random point of the ball (Wong, Rice & Kolter, 2020, algorithm 3).

    Steps much longer than that let the model learn to mask its gradients (catastrophic overfitting, section 5): robust
    accuracy falls to nothing within an epoch. A ``patience`` keeps the epoch before.
    """

    bibtex: ClassVar[str] = """@inproceedings{wong2020fast,
  title     = {Fast is Better than Free: Revisiting Adversarial Training},
  author    = {Eric Wong and Leslie Rice and J. Zico Kolter},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}"""

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            threat = self.threat_at(epoch)
            moved = ascend(input_gradient(model, Goal(y)), threat.sample(noise, x), x, threat, 1, 1.25 * threat.eps)
            logits = model(moved)
            return F.cross_entropy(logits, y), logits

        return loss
