"""Training with layers that are Parseval tight frames, so that no answer moves further than its input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.defended import Defended
from robustbench_lite.lipschitz import unfolding
from robustbench_lite.models import ConvexBlock, ConvexSum
from robustbench_lite.noise import Noise
from robustbench_lite.registry import defense
from robustbench_lite.training import Lab, Loss, Recipe

LARGE, SHARE = 100, 0.3  # of layers with more rows than that, so many are retracted after a step


@defense("parseval")
@dataclass(frozen=True)
class Parseval(Recipe):
    """Cross-entropy with layers held near tight frames, whose singular values are all 1 (Cisse et al., 2017).

    After each step W becomes (1 + beta) W - beta W W^T W (algorithm 1), in large layers a random 30 % of its rows;
    before and after training the nearest frame is taken. A convolution's W is its unfolded kernel, so scaled that its
    operator norm is at most 1; residual sums are convex, with weights that are projected onto the simplex. Logits then
    move no further than inputs, in l2, and differ little: in the loss, and only there, they are divided by
    ``temperature``. The lower, the closer it fits; the higher, the larger the margins.
    """

    shift: int = 1
    beta: float = 0.5
    temperature: float = 0.1

    bibtex: ClassVar[str] = """@inproceedings{cisse2017parseval,
  title     = {Parseval Networks: Improving Robustness to Adversarial Examples},
  author    = {Moustapha Cisse and Piotr Bojanowski and Edouard Grave and Yann Dauphin and Nicolas Usunier},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 0.5:
            raise ValueError(f"beta must be above 0 and at most 0.5, not {self.beta:g}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        _require_chain(model)
        _tighten(model)
        defended = super().__call__(model, lab)
        _tighten(model)
        return defended

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            logits = model(x)
            return F.cross_entropy(logits / self.temperature, y), logits

        return loss

    @torch.no_grad()
    def after_step(self, model: nn.Module, noise: Noise) -> None:
        for layer in model.modules():
            if isinstance(layer, ConvexSum):
                layer.project()
        for name, matrix, scale in _matrices(model):
            rows = slice(None)
            if len(matrix) > LARGE:
                order = noise.at(name).permutation(torch.empty(1, len(matrix)))[0]
                rows = order[: round(SHARE * len(matrix))]
            matrix[rows] = retracted(matrix[rows] * scale, self.beta) / scale


def retracted(rows: Tensor, beta: float) -> Tensor:
    """One step of gradient descent, of length ``beta``, towards orthonormal rows."""
    return (1 + beta) * rows - beta * (rows @ rows.T) @ rows


@torch.no_grad()
def _tighten(model: nn.Module) -> None:
    """Gives each layer the nearest tight frame: every singular value becomes 1."""
    for _, matrix, scale in _matrices(model):
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        matrix.copy_(left @ right / scale)


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, float]]:
    """The weights of each layer as a matrix with no more rows than columns, and what makes them its frame."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            matrix = layer.weight.detach().flatten(1)
            yield name, matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T, unfolding(layer)


def _require_chain(model: nn.Module) -> None:
    """Sees that nothing but its layers can stretch a difference."""
    known = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten, ConvexBlock)
    other = [type(layer).__name__ for layer in model.children() if not isinstance(layer, known)]
    if not isinstance(model, nn.Sequential) or other:
        raise ValueError(
            f"parseval trains chains of {', '.join(kind.__name__ for kind in known)} (cnn, cnn-large, mlp, "
            f"convex-resnet), not {other[0] if other else type(model).__name__}: it has no frame for batch norm"
        )
