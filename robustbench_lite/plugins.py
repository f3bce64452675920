"""What a plugin is: a frozen dataclass whose fields are its settings, registered by name, and one call."""

from typing import ClassVar, Protocol, Self, TypeGuard

from torch import Tensor, nn

from robustbench_lite.certificate import Certificate
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.problem import Access, Problem
from robustbench_lite.threat import ThreatModel
from robustbench_lite.training import Lab


class Plugin(Protocol):
    """What every plugin may state beside its settings."""

    name: ClassVar[str]  # set by the decorator that registers it
    version: ClassVar[int] = 1  # raised when the body changes what comes out
    bibtex: ClassVar[str] = ""


class Attack(Plugin, Protocol):
    """Proposes inputs; what they are worth is judged elsewhere.

    ``access`` is what it needs to see of the model, ``norms`` names the threat models that it knows. An attack that
    ``minimises`` seeks the nearest adversarial input: eps does not bind it, and one run gives the whole curve over eps.
    """

    access: ClassVar[Access]
    norms: ClassVar[frozenset[str]]
    minimises: ClassVar[bool] = False

    def __call__(self, problem: Problem) -> Tensor:
        """Candidates, shaped as ``problem.x``."""


class Learner(Attack, Protocol):
    """An attack that learns something from training data first, once for each model and threat model.

    ``learned`` is None until then, and a field that is not compared; ``images`` says how many inputs it learns from.
    """

    images: int
    learned: Tensor | None

    def fit(self, problem: Problem) -> Self:
        """The same attack with what it has learned; no input of ``problem`` is ever closed."""


class Crafted(Attack, Protocol):
    """An attack that is crafted on another model: its ``source``, which it meets at ``problem.on(source, access)``."""

    source: str


def crafted(attack: Attack) -> TypeGuard[Crafted]:
    return hasattr(attack, "source")


def learns(attack: Attack) -> TypeGuard[Learner]:
    return hasattr(attack, "fit")


class Defense(Plugin, Protocol):
    """A recipe trains a model (``trains``, first in a chain); a wrapper guards one that is trained.

    A recipe with a field ``eps`` of None trains at the data set's customary eps for its field ``norm``. What it asks
    ``lab.sources`` for stands in a field ``sources``, a tuple of specs.
    """

    trains: ClassVar[bool]

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        """The defended model, in eval mode."""


class Certifier(Plugin, Protocol):
    """Proves that no input of the threat model changes the model's answer.

    One with an ``exact_radius`` answers with the largest radius that it can prove, whatever eps it is asked about.
    """

    norms: ClassVar[frozenset[str]]
    exact_radius: ClassVar[bool] = False

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        """What is proved of labels ``y`` (B,) around inputs ``x`` (B, ...).

        Raises:
            ValueError: for a model that the method does not cover; names the layer, and what it covers.
        """
