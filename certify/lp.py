"""Linear programs over the triangle relaxation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.bounds import differences
from robustbench_lite.certificate import Certificate
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.registry import certifier
from robustbench_lite.threat import ThreatModel

from ._program import NORMS, Network, over_ball


@certifier("lp")
@dataclass(frozen=True)
class LP:
    """The best that any relaxation of single ReLUs can prove (Salman et al., 2019, section 4.1), by linear programs.

    One a margin, and with ``refine`` two a hidden neuron whose sign CROWN does not settle: without them, CROWN with
    optimised slopes may know these neurons better. For small networks of affine layers and (leaky) ReLUs; l2 balls are
    not polyhedra.
    """

    refine: bool = True

    norms: ClassVar[frozenset[str]] = NORMS
    bibtex: ClassVar[str] = """@inproceedings{salman2019convex,
  title     = {A Convex Relaxation Barrier to Tight Robustness Verification of Neural Networks},
  author    = {Hadi Salman and Greg Yang and Huan Zhang and Cho-Jui Hsieh and Pengchuan Zhang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019}
}"""

    @torch.no_grad()
    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        network = Network.of(model, x.shape[1:])
        bounds = network.bounds(x, threat)
        margins, reasons = [], []
        for row, functions in enumerate(differences(y.cpu(), network.classes)):
            program = over_ball(network, bounds, row, refine=self.refine)
            answers = [program.least(function) for function in functions]
            failed = next((answer.status for answer in answers if not answer.optimal), "")
            margins.append(torch.nan if failed else min(answer.bound for answer in answers))
            reasons.append(failed and f"HiGHS ended with {failed}")
        return Certificate.of_margins(torch.tensor(margins).to(y.device), y, threat.eps, reasons)
