"""The ascent that attacks and adversarial training share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustbench_lite.kernels import ImageGradients
from robustbench_lite.threat import ThreatModel


def ascend(
    gradient: Callable[[Tensor], Tensor], x: Tensor, clean: Tensor, threat: ThreatModel, steps: int, length: float
) -> Tensor:
    """Projected steepest ascent (Madry et al., 2018, section 2.1), ``steps`` steps of size ``length`` from ``x``."""
    for _ in range(steps):
        x = threat.step(x, clean, gradient(x), length)
    return x


def customary_length(eps: float, steps: int) -> float:
    """A step with which ``steps`` of them cross the ball with room to spare (Madry et al., 2018, appendix)."""
    return 2.5 * eps / steps


def input_gradient(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of ``loss``, of logits (B, C) to (B,), at an input; none is taken of the parameters."""

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with ImageGradients():
            logits = model(x)
        return torch.autograd.grad(loss(logits).sum(), x)[0]

    return gradient
