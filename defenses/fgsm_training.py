"""Adversarial training as it was first done, and why one step from the input is not enough."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, input_gradient
from robustbench_lite.noise import Noise
from robustbench_lite.papers import GOODFELLOW_2015
from robustbench_lite.registry import defense
from robustbench_lite.threat import Goal
from robustbench_lite.training import AdversarialRecipe, Lab, Loss


@defense("fgsm-training")
@dataclass(frozen=True)
class FGSMTraining(AdversarialRecipe):
    """Trains on every batch and on what FGSM makes of it, in equal parts (Goodfellow et al., 2015, section 6).

    A cautionary tale: the model learns to mask its gradients and to read the label off the perturbation, so that FGSM
    is held while R-FGSM, PGD and transfer are not (Tramer et al., 2018, section 3).
    """

    epochs: int = 12

    bibtex: ClassVar[str] = GOODFELLOW_2015

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            threat = self.threat_at(epoch)
            logits = model(ascend(input_gradient(model, Goal(y).cross_entropy), x, x, threat, 1, threat.eps))
            return (F.cross_entropy(model(x), y) + F.cross_entropy(logits, y)) / 2, logits

        return loss
