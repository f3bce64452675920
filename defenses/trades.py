"""Adversarial training that says what robustness may cost in clean accuracy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, customary_length
from robustbench_lite.noise import Noise
from robustbench_lite.registry import defense
from robustbench_lite.training import AdversarialRecipe, Lab, Loss


@defense("trades")
@dataclass(frozen=True)
class Trades(AdversarialRecipe):
    """Cross-entropy on clean images, and ``beta`` times how far the answer moves in the ball (Zhang et al., 2019).

    Equation 5: the second term is the Kullback-Leibler divergence between the answers to a clean image and to what
    PGD makes of it, ascending that divergence from near the image. A step has length 2.5 eps / steps.
    """

    steps: int = 8
    beta: float = 1.0

    bibtex: ClassVar[str] = """@inproceedings{zhang2019theoretically,
  title     = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author    = {Hongyang Zhang and Yaodong Yu and Jiantao Jiao and Eric P. Xing and Laurent {El Ghaoui} and
               Michael I. Jordan},
  booktitle = {International Conference on Machine Learning},
  year      = {2019}
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.beta > 0:
            raise ValueError(f"steps must be 1 or more and beta above 0, not {self.steps} and {self.beta:g}")

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            threat = self.threat_at(epoch)
            clean = model(x)

            def gradient(at: Tensor) -> Tensor:
                at = at.detach().requires_grad_()
                return torch.autograd.grad(divergence(clean.detach(), model(at)).sum(), at)[0]

            near = x + 0.001 * noise.normal(x)  # the divergence is flat at the image itself
            logits = model(ascend(gradient, near, x, threat, self.steps, customary_length(threat.eps, self.steps)))
            return F.cross_entropy(clean, y) + self.beta * divergence(clean, logits).mean(), logits

        return loss


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the answers that logits (B, C) stand for: (B,)."""
    return F.kl_div(moved.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
