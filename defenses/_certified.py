"""What recipes that train on bounds share."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.bounds import Ball, Graph, Unbounded, differences, trace
from robustbench_lite.certificate import SOUND
from robustbench_lite.data import Images
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.threat import ThreatModel
from robustbench_lite.training import AdversarialRecipe, Lab, Loss


@dataclass(frozen=True)
class CertifiedRecipe(AdversarialRecipe):
    """Trains on lower bounds on the margins, over a ball ``stretch`` times as wide as ``eps``.

    The loss is a share of the clean logits' cross-entropy, and for the rest that of the worst logits that the bounds
    leave possible. Over the first ``warmup`` epochs the ball grows from a point, and the share falls from 1 to
    ``kappa``. While it trains, robust accuracy is what :meth:`proved` bounds say at ``eps``.
    """

    kappa: float = 0.5
    stretch: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa must lie in [0, 1], not {self.kappa:g}")
        if not self.stretch >= 1:
            raise ValueError(f"stretch must be 1 or more, not {self.stretch:g}")

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        try:
            trace(model.train(), lab.data.shape)
        except Unbounded as error:
            raise ValueError(f"{self.name} trains on bounds, and {error}") from error
        self.begin(model, lab)
        return super().__call__(model, lab)

    def begin(self, model: nn.Module, lab: Lab) -> None:
        """Sets the weights that training starts from."""

    @abstractmethod
    def proved(self, graph: Graph, ball: Ball, functions: Tensor) -> Tensor:
        """Sound lower bounds (B, S) on linear functions (B, S, C) of the logits."""

    def margins(self, graph: Graph, ball: Ball, functions: Tensor, noise: Noise, epoch: float) -> Tensor:
        """The bounds (B, S) that it trains on; ``epoch`` counts from 0 in fractions."""
        return self.proved(graph, ball, functions)

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
            logits, grown = model(x), self.grown(epoch)
            functions = differences(y, logits.shape[1])
            margins = self.margins(trace(model, x.shape[1:]), Ball(x, self.threat_at(epoch)), functions, noise, epoch)
            share = 1 - (1 - self.kappa) * grown
            return share * F.cross_entropy(logits, y) + (1 - share) * worst_cross_entropy(margins).mean(), logits

        return loss

    def threat(self, data: Images | None = None) -> ThreatModel:
        return super().threat_at(self.warmup)

    def threat_at(self, epoch: float) -> ThreatModel:
        threat = super().threat_at(epoch)
        return replace(threat, eps=threat.eps * self.stretch)

    @torch.no_grad()
    def survives(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        graph = trace(model, x.shape[1:])
        (classes,) = graph.output.shape
        margins = self.proved(graph, Ball(x, threat), differences(y, classes))
        return margins.amin(1) > SOUND[margins.dtype]


@dataclass(frozen=True)
class WarmRecipe(CertifiedRecipe):
    """With ``warm_start`` it begins with the weights that ``ibp`` gives at the same eps."""

    warm_start: bool = True

    @property
    def sources(self) -> tuple[str, ...]:
        return (f"ibp:norm={self.norm},eps={self.eps}",) if self.warm_start else ()

    def begin(self, model: nn.Module, lab: Lab) -> None:
        for source in self.sources:
            model.load_state_dict(lab.sources(source).model.state_dict())


def worst_cross_entropy(margins: Tensor) -> Tensor:
    """The cross-entropy (B,) of the worst logits that lower bounds (B, C-1) on the margins leave possible.

    No logits within the bounds have a greater one, for it falls with every margin (Gowal et al., 2018, section 3).
    """
    return F.pad(-margins, (1, 0)).logsumexp(1)
