"""Adversarial training at twice the price of standard training."""

from dataclasses import dataclass
from typing import ClassVar, Literal

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

    As there, the start minds the ball and not the pixel range. At any time the model may learn to mask its gradients
    (catastrophic overfitting, section 5) and robust accuracy falls within an epoch: ``patience`` keeps the best one.
    """

    rate: float = 3e-3
    schedule: Literal["cosine", "step", "cyclic"] = "cyclic"
    patience: int = 8
    warmup: int = 1

    bibtex: ClassVar[str] = """@inproceedings{wong2020fast,
  title     = {Fast is Better than Free: Revisiting Adversarial Training},
  author    = {Eric Wong and Leslie Rice and J. Zico Kolter},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}"""

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            threat = self.threat_at(epoch)
            start = x + threat.norm.sample(noise, x, threat.eps)
            logits = model(ascend(input_gradient(model, Goal(y).cross_entropy), start, x, threat, 1, 1.25 * threat.eps))
            return F.cross_entropy(logits, y), logits

        return loss
