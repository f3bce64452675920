"""Adversarial training."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, customary_length, input_gradient
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.registry import defense
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from robustbench_lite.training import Lab, fit


@defense("madry")
@dataclass(frozen=True)
class Madry:
    """Trains on what PGD makes of every batch (Madry et al., 2018, equation 2.1).

    ``eps`` rises from 0 over the first ``warmup`` epochs, without which training at 0.3 stays at chance; none stands
    for the data set's customary eps. A step of the attack has length 2.5 eps / steps.
    """

    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: float | None = None
    steps: int = 8
    warmup: int = 4
    epochs: int = 24
    batch: int = 128
    rate: float = 1e-3

    trains: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Aleksander Madry and Aleksandar Makelov and Ludwig Schmidt and Dimitris Tsipras and Adrian Vladu},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}"""

    def __post_init__(self) -> None:
        if self.eps is not None and not self.eps > 0:
            raise ValueError(f"eps must be above 0, not {self.eps:g}")
        if self.steps < 1 or self.warmup < 0:
            raise ValueError("steps must be 1 or more, and warmup 0 or more")

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        assert self.eps is not None, "completed by the harness"
        norm, full = find_norm(self.norm), self.eps

        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            eps = full * min(1.0, epoch / self.warmup) if self.warmup else full
            threat = ThreatModel(norm, eps)
            start = threat.sample(noise, x)
            gradient = input_gradient(model, Goal(y))
            logits = model(ascend(gradient, start, x, threat, self.steps, customary_length(eps, self.steps)))
            return F.cross_entropy(logits, y), logits

        fit(model, lab, loss, epochs=self.epochs, batch=self.batch, rate=self.rate)
        return Defended(model).eval()
