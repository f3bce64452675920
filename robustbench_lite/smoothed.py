"""A classifier smoothed by Gaussian noise: what it most often says near an input."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.defended import Defended, ask
from robustbench_lite.noise import Noise

BLOCK = 128  # draws of an input that are asked at once; part of the key of its noise
TOGETHER = 2**22  # numbers in a batch of noisy inputs, so that memory stays near 100 MB


class Smoothed(Defended):
    """The mean softmax output under Gaussian noise of deviation ``sigma`` (Salman et al., 2019, equation 2), as logits.

    The ``draws`` are fixed by ``seed``, the same for every input and every query. The defense is then one plain
    function: the same answer whatever the batch, differentiable (its gradient is EOT over the very draws that judge),
    and asking it again wins an attack nothing, which it would were fresh noise drawn each time.

    It estimates the classifier that :meth:`votes` counts and the certifier ``smoothing`` proves things of: that one has
    infinitely many draws, and hard votes. An attack may break the estimate where that one holds; more draws close the
    gap.
    """

    def __init__(self, model: nn.Module, sigma: float = 0.25, draws: int = 16, seed: int = 0) -> None:
        super().__init__(model)
        self.sigma, self.draws, self.seed = sigma, draws, seed

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Logs of the mean probabilities, (B, C); the draws are its own, whatever ``noise``."""
        model = self.model.differentiable if isinstance(self.model, Defended) else self.model
        fixed = Noise(self.seed, torch.arange(self.draws)).at("smoothed")
        ways = fixed.normal(x[:1].detach().expand(self.draws, *x.shape[1:]))
        answers = torch.stack([F.log_softmax(model(x + self.sigma * way), 1) for way in ways])
        return answers.logsumexp(0) - math.log(self.draws)

    @torch.no_grad()
    def votes(self, x: Tensor, noise: Noise, draws: int) -> Tensor:
        """How often the model says each class in ``draws`` draws of noise, each input's its own: (B, C) int64."""
        rows = max(1, TOGETHER // (BLOCK * x[0].numel()))
        return torch.cat([self._votes(*piece, draws) for piece in zip(x.split(rows), _split(noise, rows))])

    def _votes(self, x: Tensor, noise: Noise, draws: int) -> Tensor:
        """SampleUnderNoise of Cohen, Rosenfeld & Kolter (2019, section 3.2)."""
        model = Defended(self.model)
        model.least = self.least
        counts: list[Tensor] = []
        for first in range(0, draws, BLOCK):
            clean = x.unsqueeze(1).expand(-1, min(BLOCK, draws - first), *x.shape[1:])
            noisy = clean + self.sigma * noise.at("draws", first).normal(clean)
            logits = ask(model, noisy.flatten(0, 1), len(noisy.flatten(0, 1)))
            counts.append(F.one_hot(logits.argmax(1), logits.shape[1]).view(len(x), -1, logits.shape[1]).sum(1))
        return torch.stack(counts).sum(0)


def _split(noise: Noise, rows: int) -> list[Noise]:
    return [noise.over(some) for some in noise.rows.split(rows)]
