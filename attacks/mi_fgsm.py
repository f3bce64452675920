"""The momentum iterative fast gradient sign method."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.norms import by_row, l1
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import attack


@attack("mi-fgsm")
@dataclass(frozen=True)
class MIFGSM:
    """Steps of eps / steps along a running sum of l1-normalised gradients (Dong et al., 2018, algorithm 1).

    ``decay`` is what the sum keeps of itself at each step (mu); 0 is the basic iterative method.
    """

    steps: int = 10
    decay: float = 1.0

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    bibtex: ClassVar[str] = """@inproceedings{dong2018boosting,
  title     = {Boosting Adversarial Attacks with Momentum},
  author    = {Yinpeng Dong and Fangzhou Liao and Tianyu Pang and Hang Su and Jun Zhu and Xiaolin Hu and Jianguo Li},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2018}
}"""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if not self.decay >= 0:
            raise ValueError(f"decay must be 0 or more, not {self.decay:g}")

    def __call__(self, problem: Problem) -> Tensor:
        threat, x = problem.threat, problem.x
        momentum = torch.zeros_like(x)
        for _ in range(self.steps):
            gradient, _ = problem.gradient(x)
            length = l1.size(gradient).clamp_min(torch.finfo(x.dtype).tiny)
            momentum = self.decay * momentum + gradient / by_row(length, x)
            x = threat.step(x, problem.x, momentum, threat.eps / self.steps)
        return x
