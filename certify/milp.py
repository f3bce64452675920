"""Mixed-integer programs: complete, for small networks."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robustbench_lite.bounds import Bounds, differences
from robustbench_lite.certificate import FALSIFIED, UNDECIDED, Certificate
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.registry import certifier
from robustbench_lite.threat import ThreatModel

from ._program import NORMS, SURE, Network, over_ball

# HiGHS minimises a margin less SURE: it stops with a bound above 0, a hundredth of the least that it found, or with a
# counterexample beyond doubt; or at the least.
SIGN = {"mip_rel_gap": 0.99, "objective_target": -2 * SURE}
LEAST = {"mip_rel_gap": 0.0}


class Finding(NamedTuple):
    """Of one input: a lower bound on its margin, a counterexample or None, and why it is unknown, if it is."""

    margin: Tensor
    point: Tensor | None = None
    reason: str = f"its margin is within {SURE:g} of 0"


@certifier("milp")
@dataclass(frozen=True)
class MILP:
    """Verified, or falsified with a counterexample, by mixed-integer programs (Tjeng, Xiao & Tedrake, 2019, section 4).

    One for each margin that CROWN does not settle, with a binary variable for each hidden neuron that it does not. They
    stop once the margin's sign is known or, with ``least``, at the least margin of all classes. What is not known of an
    input after ``seconds`` stays unknown. For small networks of affine layers and (leaky) ReLUs; HiGHS has no
    mixed-integer programs over l2 balls.
    """

    seconds: float = 60
    least: bool = False

    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = """@inproceedings{tjeng2019evaluating,
  title     = {Evaluating Robustness of Neural Networks with Mixed Integer Programming},
  author    = {Vincent Tjeng and Kai Xiao and Russ Tedrake},
  booktitle = {International Conference on Learning Representations},
  year      = {2019}
}"""

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, not {self.seconds:g}")

    @torch.no_grad()
    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        network = Network.of(model, x.shape[1:])
        bounds, functions = network.bounds(x, threat), differences(y.cpu(), network.classes).double()
        known = bounds.lower(functions)
        found = [self._find(network, bounds, row, x.cpu()[[row]], functions[row], known[row]) for row in range(len(x))]
        margin = torch.stack([one.margin for one in found]).float().to(y.device)
        certificate = Certificate.of_margins(margin, y, threat.eps)
        status = [said if one.point is None else FALSIFIED for said, one in zip(certificate.status, found)]
        reason = [one.reason if said == UNDECIDED else "" for said, one in zip(status, found)]
        points = [clean if one.point is None else one.point.to(x.device) for clean, one in zip(x.split(1), found)]
        return replace(certificate, status=status, reason=reason, counterexample=torch.cat(points))

    def _find(
        self, network: Network, bounds: Bounds, row: int, clean: Tensor, functions: Tensor, margins: Tensor
    ) -> Finding:
        """Works on one class after the other, from the nearest on; ``margins`` (classes - 1,) are at least so much."""
        if not self.least and (margins > SURE).all():
            return Finding(margins.amin())
        deadline = time.monotonic() + self.seconds
        program, least, point = over_ball(network, bounds, row, exact=True), margins.new_tensor(0.0), None
        reason = Finding.reason
        for other in margins.argsort():
            if not self.least and (point is not None or margins[other] > SURE):
                break
            left = max(0.0, deadline - time.monotonic())
            answer = program.least(functions[other], time_limit=left, **(LEAST if self.least else SIGN))
            if answer.optimal:
                margins[other] = margins[other].clamp_min(answer.bound)
            else:
                reason = f"HiGHS ended with {answer.status} ({self.seconds:g} s were allowed)"
            if answer.x is not None:
                tried = bounds.ball.threat.project_strictly(answer.x.view_as(clean), clean)
                margin = (functions @ network.model(tried.double())[0]).amin()
                if margin < least:
                    least, point = margin, tried
        return Finding(margins.amin() if point is None else torch.minimum(margins.amin(), least), point, reason)
