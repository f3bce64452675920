"""No defense: training on clean images, the row that every other is read against."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustbench_lite.defended import Defended
from robustbench_lite.registry import defense
from robustbench_lite.training import Lab, cross_entropy, fit


@defense("standard")
@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean images, each moved by up to ``shift`` pixels."""

    epochs: int = 12
    batch: int = 128
    rate: float = 1e-3
    shift: int = 1

    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift must be 0 or more, not {self.shift}")

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        fit(model, lab, cross_entropy(model, self.shift), epochs=self.epochs, batch=self.batch, rate=self.rate)
        return Defended(model).eval()
