"""A classifier smoothed by Gaussian noise: what it most often says near an input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.defended import Defended, ask
from robustbench_lite.noise import Noise

BLOCK = 128  # draws of an input that are asked at once; part of the key of its noise
TOGETHER = 2**22  # numbers in a batch of noisy inputs, so that memory stays near 100 MB


class Smoothed(Defended):
    """Says what the model says of an input under Gaussian noise of deviation ``sigma``, anew each time.

    ``draws`` of it vote, and an attack that averages over as many follows the gradient of the mean softmax output
    (Salman et al., 2019, equation 2). The certifier ``smoothing`` proves things of the vote of infinitely many, which
    :meth:`votes` estimates: an attack may win a vote of few where that one holds.
    """

    stochastic = True

    def __init__(self, model: nn.Module, sigma: float = 0.25, draws: int = 16) -> None:
        super().__init__(model)
        self.sigma, self.draws = sigma, draws

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        assert noise is not None
        return self.within(x + self.sigma * noise.at("smoothed").normal(x), noise)

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
            votes = F.one_hot(logits.argmax(1), logits.shape[1]) * logits.isfinite().all(1, keepdim=True)
            counts.append(votes.view(len(x), -1, logits.shape[1]).sum(1))
        return torch.stack(counts).sum(0)


def _split(noise: Noise, rows: int) -> list[Noise]:
    return [noise.over(some) for some in noise.rows.split(rows)]
