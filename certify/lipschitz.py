"""Certificates by Lipschitz constants."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.certificate import SOUND, Certificate
from robustbench_lite.defended import Defended, ask
from robustbench_lite.lipschitz import pairwise
from robustbench_lite.noise import Noise
from robustbench_lite.registry import certifier
from robustbench_lite.threat import ThreatModel


@certifier("lipschitz")
@dataclass(frozen=True)
class Lipschitz:
    """No logit gains on the label's faster than the network's Lipschitz constant allows (Tsuzuku et al., 2018).

    The constant is a product, in residual sums a sum, of bounds on l2 operator norms; for a last layer that is linear,
    the norm of the difference of two of its rows stands instead. An l1 ball lies in the l2 ball of the same size, an
    linf ball of d numbers in that of sqrt(d) times the size.
    """

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    exact_radius: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{tsuzuku2018lipschitz,
  title     = {Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance for Deep Neural Networks},
  author    = {Yusuke Tsuzuku and Issei Sato and Masashi Sugiyama},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2018}
}"""

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        slopes = pairwise(model, x)
        with torch.no_grad():
            logits = ask(model, x, len(x))
        slopes = slopes.to(logits)[y]
        if threat.norm.name == "linf":
            slopes = slopes * math.sqrt(x[0].numel())
        gap = logits.gather(1, y.unsqueeze(1)) - logits
        gap = gap.scatter(1, y.unsqueeze(1), torch.inf)
        margin = (gap - slopes * threat.eps).amin(1)
        radius = ((gap - SOUND[gap.dtype]) / slopes).amin(1).clamp_min(0)
        return replace(Certificate.of_margins(margin, y, threat.eps), radius=radius)
