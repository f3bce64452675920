"""The models that plugins are held to, and attacks written on the spot."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_lite.norms import NORMS
from robustbench_lite.problem import Access, Problem
from robustbench_lite.testing.nets import DUAL as DUAL
from robustbench_lite.testing.nets import GUARDED as GUARDED
from robustbench_lite.testing.nets import Guarded as Guarded
from robustbench_lite.testing.nets import Halfspace as Halfspace
from robustbench_lite.testing.nets import Linear as Linear
from robustbench_lite.testing.nets import convolutional as convolutional
from robustbench_lite.testing.nets import guarded as guarded
from robustbench_lite.testing.nets import halfspace as halfspace
from robustbench_lite.testing.nets import many_classes as many_classes
from robustbench_lite.testing.nets import nearest as nearest


@dataclass(frozen=True)
class Scripted:
    """An attack that does what it is told."""

    call: Callable[[Problem], object]
    access: Access = "gradients"
    minimises: bool = False

    name: ClassVar[str] = "scripted"
    norms: ClassVar[frozenset[str]] = frozenset(NORMS)

    def __call__(self, problem: Problem) -> Tensor:
        return self.call(problem)  # type: ignore[return-value]
