"""What is proved of each input of a batch."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["verified", "falsified", "unknown", "unsupported"]
VERIFIED: Verdict = "verified"
FALSIFIED: Verdict = "falsified"
UNDECIDED: Verdict = "unknown"
UNSUPPORTED: Verdict = "unsupported"

SOUND = {torch.float32: 1e-4, torch.float64: 1e-9}  # a bound counts only above this: rounding cannot have made it


@dataclass(frozen=True)
class Certificate:
    """What a certifier says of inputs (B, ...): one entry an input in every field.

    ``label`` is the class that holds in the whole ball, -1 where none is proved; ``radius``, in units of the threat
    model's norm, is how far it is proved to hold, 0 where it is not; ``margin`` is a lower bound over the ball on the
    label's logit minus the best other one, NaN where the method has none. ``counterexample`` holds points of the ball
    where the status is ``falsified``, and anything elsewhere; ``reason`` says why something is unknown, or "".
    """

    label: Tensor
    radius: Tensor
    margin: Tensor
    status: list[Verdict]
    counterexample: Tensor | None = None
    reason: list[str] | None = None

    @staticmethod
    def of_margins(margin: Tensor, y: Tensor, eps: float, reason: list[str] | None = None) -> "Certificate":
        """Verified for labels ``y`` within ``eps`` where the margin bound (B,) is above 0 beyond doubt."""
        proved = margin > SOUND[margin.dtype]
        return Certificate(
            label=torch.where(proved, y, -1),
            radius=torch.where(proved, eps, 0.0),
            margin=margin,
            status=[VERIFIED if one else UNDECIDED for one in proved.tolist()],
            reason=reason,
        )

    @staticmethod
    def of_radius(label: Tensor, radius: Tensor, eps: float) -> "Certificate":
        """How far each ``label`` (B,) holds: verified where the radius (B,) reaches ``eps``, and kept elsewhere."""
        proved = (radius >= eps) & (radius > 0)
        return Certificate(
            label=torch.where(proved, label, -1),
            radius=radius,
            margin=torch.full_like(radius, torch.nan),
            status=[VERIFIED if one else UNDECIDED for one in proved.tolist()],
        )
