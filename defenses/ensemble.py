"""Adversarial training on what fools other models."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, input_gradient
from robustbench_lite.noise import Noise
from robustbench_lite.papers import TRAMER_2018
from robustbench_lite.registry import defense
from robustbench_lite.threat import Goal
from robustbench_lite.training import AdversarialRecipe, Lab, Loss


@defense("ensemble")
@dataclass(frozen=True)
class Ensemble(AdversarialRecipe):
    """Trains on every batch and on what FGSM makes of it, in equal parts (Tramer et al., 2018, section 3.4).

    Each batch draws the model that FGSM sees: one of the ``sources``, defenses trained beforehand that change no more,
    or the model in training. A step leads away from what that model says, be it wrong, so that no step tells the label;
    where it is ``varied``, its size is drawn too, between 0 and eps (Kurakin et al., 2017, draw one for each image).
    """

    epochs: int = 8
    warmup: int = 2
    varied: bool = True
    sources: tuple[str, ...] = ("standard@cnn", "standard@mlp")

    bibtex: ClassVar[str] = TRAMER_2018

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ValueError("sources must name a model or more")

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        crafters = [*map(lab.sources, self.sources), model]

        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            threat, one = self.threat_at(epoch), torch.empty(1, 1)
            if self.varied:
                threat = replace(threat, eps=threat.eps * float(noise.at("eps")[:1].uniform(one)))
            crafter = crafters[int(noise.at("crafter")[:1].integers(len(crafters), one))]
            with torch.no_grad():
                said = Goal(crafter(x).argmax(1))
            logits = model(ascend(input_gradient(crafter, said.cross_entropy), x, x, threat, 1, threat.eps))
            return (F.cross_entropy(model(x), y) + F.cross_entropy(logits, y)) / 2, logits

        return loss
