"""What the adversary may do (:class:`ThreatModel`) and what the adversary wants (:class:`Goal`)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS, Norm
from robustbench_lite.wording import suggest


def parse_number(text: str) -> float:
    """``"0.3"`` or ``"8/255"`` as a number."""
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number; write 0.3 or 8/255") from None


def find_norm(name: str) -> Norm:
    if name not in NORMS:
        raise ValueError(f"no norm {name!r}; {suggest(name, NORMS)}")
    return NORMS[name]


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """Perturbations of size at most ``eps`` (units of the pixel range; l0: pixels; patch: share of the area) that stay
    within the pixel range [lower, upper]."""

    norm: Norm
    eps: float
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"{self.norm.name}: eps must be 0 or more, not {self.eps:g}")
        if not self.lower < self.upper:
            raise ValueError(f"a pixel range needs lower < upper, not {self.lower:g}:{self.upper:g}")

    @classmethod
    def parse(cls, text: str) -> "ThreatModel":
        """``"linf:8/255"`` as a threat model.

        Raises:
            ValueError: for an unknown norm, or an eps that is negative or wider than the pixel range.
        """
        name, colon, eps = text.strip().partition(":")
        norm = find_norm(name)
        if not colon:
            raise ValueError(f"threat {text!r} has no eps; write {name}:0.3")
        threat = cls(norm, parse_number(eps))
        if math.isinf(threat.eps):
            raise ValueError(f"threat {text!r} allows everything; eps must be finite")
        if name in ("linf", "patch") and threat.eps > 1:
            unit = "pixels run from 0 to 1" if name == "linf" else "it is a share of the image's area"
            raise ValueError(f"{name}: eps {threat.eps:g} is above 1, but {unit}; did you mean {threat.eps:g}/255?")
        return threat

    def __str__(self) -> str:
        return f"{self.norm.name}:{self.eps:g}"

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        """A point inside ball and box, the nearest one for linf and l1; idempotent up to rounding."""
        return self.norm.confine(x, clean, self.eps, self.lower, self.upper)

    def project_strictly(self, x: Tensor, clean: Tensor) -> Tensor:
        """As :meth:`project`, but rounded towards ``clean``, so that not even the last bit lies outside."""
        exact = self.project(x.double(), clean.double())
        rounded = exact.to(clean.dtype)
        outside = (rounded.double() - clean).abs() > (exact - clean).abs()
        return torch.where(outside, torch.nextafter(rounded, clean), rounded)

    def step(self, x: Tensor, clean: Tensor, grad: Tensor, length: float) -> Tensor:
        """A projected steepest ascent step of size ``length``; coordinates held at a pixel bound take no part."""
        if self.norm.shared:
            most = torch.finfo(grad.dtype).max  # room times this, not masks: on a CPU they are five times slower
            down, up = (self.lower - x).sign().clamp_max(0), (self.upper - x).sign().clamp_min(0)
            grad = grad.clamp(down * most, up * most)
        way = self.norm.steepest(grad)
        return self.project(torch.add(x, way, alpha=length, out=way), clean)

    def sample(self, noise: Noise, clean: Tensor) -> Tensor:
        """A random admissible input near ``clean``."""
        return self.project(clean + self.norm.sample(noise, clean, self.eps), clean)

    def inside(self, x: Tensor, slack: float = 0.0) -> Tensor:
        """Which rows of ``x`` lie in the pixel range: (B,) bool; NaN never does."""
        flat = x.flatten(1)  # its extremes are NaN where it is
        return (flat.amin(1) >= self.lower - slack) & (flat.amax(1) <= self.upper + slack)

    def allows(self, x: Tensor, clean: Tensor, slack: float = 1e-5) -> Tensor:
        """Which rows of ``x`` the adversary may show the model; ``slack`` forgives rounding."""
        return self.inside(x, slack) & (self.norm.size(x - clean) <= self.reach(clean, slack))

    def reach(self, like: Tensor, slack: float = 1e-5) -> float:
        """The largest size that passes for admissible; ``slack`` is relative once sizes are above 1."""
        limit = self.norm.limit(self.eps, like)
        return limit + slack * max(1.0, limit)


@dataclass(frozen=True, slots=True)
class Goal:
    """What the adversary wants: any label but ``labels`` (B,), or exactly these when targeted.

    The only place that knows the sign of a loss. Logits are (B, C) or (B, K, C); answers (B,) or (B, K).
    """

    labels: Tensor
    targeted: bool = False

    def __getitem__(self, mask: Tensor | slice) -> "Goal":
        return Goal(self.labels[mask], self.targeted)

    def met(self, logits: Tensor) -> Tensor:
        """Where the model says what the adversary wants; NaN or infinite logits never do."""
        return self.reached(logits.argmax(-1)) & logits.isfinite().all(-1)

    def reached(self, labels: Tensor) -> Tensor:
        """Where a label, of (B,) or (B, K), is what the adversary wants; -1, that of a closed input, never is."""
        hit = labels == self.labels.view(-1, *[1] * (labels.dim() - 1))
        return (hit if self.targeted else ~hit) & (labels >= 0)

    def seen(self, answers: Tensor, classes: int) -> Tensor:
        """A model's answers (N, C), or (N, C + 1) where it has a detector, as logits (N, C) for this adversary, to
        whom "rejected" is one with the label (targeted: with the best other class): not what is wanted.

        No attack need know of detectors then: its margin is min(other - label, -score), as an adaptive attack has it.
        """
        logits, rejected = answers[:, :classes], answers[:, classes:]
        if not rejected.shape[1]:
            return answers
        unwanted = self.labels.unsqueeze(1)
        if self.targeted:
            unwanted = logits.scatter(1, unwanted, -torch.inf).argmax(1, keepdim=True)
        return logits.scatter(1, unwanted, torch.maximum(logits.gather(1, unwanted), rejected))

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Grows towards the goal, as every loss of a goal does: an attack ascends."""
        loss = -F.log_softmax(logits, -1).gather(-1, self._labels(logits).unsqueeze(-1)).squeeze(-1)
        return -loss if self.targeted else loss

    def margin(self, logits: Tensor) -> Tensor:
        """Best other logit minus the label's (targeted: the reverse); above 0 once the goal is met."""
        label = self._labels(logits).unsqueeze(-1)
        own = logits.gather(-1, label).squeeze(-1)
        other = logits.scatter(-1, label, -torch.inf).amax(-1)
        return own - other if self.targeted else other - own

    def _labels(self, logits: Tensor) -> Tensor:
        return self.labels.view(-1, *[1] * (logits.dim() - 2)).expand(logits.shape[:-1])
