"""The attacks of Foolbox, found by inspection: each class becomes settings and a call, counted and judged like ours."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import family, make, spec
from robustbench_lite.wording import one_line

LABELS = {"additive_noise", "blended_noise", "blur", "boundary_attack", "contrast", "contrast_min", "hop_skip_jump"}
LABELS |= {"inversion", "pointwise", "saltandpepper"}  # modules whose attacks look at nothing but the predicted class
SCORES = {"gen_attack"}
FLEXIBLE = frozenset({"l0", "l1", "l2", "linf"})  # of attacks that no distance guides: any will do to judge them
CANNOT = {
    "BinarizationRefinementAttack": "it refines the adversarials of another attack, and none are handed to it",
    "DatasetAttack": "it shows images of a data set, and none are fed to it",
    "SpatialAttack": "it rotates and shifts images, which no threat model here measures",
}
NEEDS_NUMBA = "BrendelBethge"
# The threat model supplies the first two; nobody reads a log; a pair is nothing that a spec can write.
NO_SETTING = {"distance", "constraint", "tensorboard", "reduced_dims"}


@family("foolbox")
def foolbox() -> dict[str, type]:
    """The attacks of Foolbox 3.3 (Rauber et al., 2020), each under its own name there."""
    try:
        import foolbox
    except ImportError as error:
        raise ValueError(f"foolbox/... needs foolbox (pip install foolbox), which does not load: {error}") from error

    spellings: dict[type, set[str]] = {}
    for name, peer in vars(foolbox.attacks).items():
        if inspect.isclass(peer) and issubclass(peer, foolbox.attacks.Attack) and not inspect.isabstract(peer):
            spellings.setdefault(peer, set()).add(f"foolbox/{_kebab(name, peer)}")
    members: dict[str, type] = {}
    for peer, names in spellings.items():
        members |= dict.fromkeys(names, _plugin(peer, min(sorted(names), key=len), foolbox.__version__))
    return members


@dataclass(frozen=True)
class Foolbox:
    """What the attacks of Foolbox share. The inputs of a batch are attacked together, solved or not, as Foolbox does;
    where it refuses a batch, its halves are tried, down to the input that it refuses.
    """

    peer: ClassVar[Any]
    cannot: ClassVar[str]  # why it does not run here; empty where it does
    version: ClassVar[str]  # Foolbox's
    access: ClassVar[Access]
    norms: ClassVar[frozenset[str]]
    minimises: ClassVar[bool]
    bibtex: ClassVar[str] = """@article{rauber2020foolbox,
  title   = {Foolbox Native: Fast adversarial attacks to benchmark the robustness of machine learning models in PyTorch,
             TensorFlow, and JAX},
  author  = {Jonas Rauber and Roland Zimmermann and Matthias Bethge and Wieland Brendel},
  journal = {Journal of Open Source Software},
  volume  = {5},
  number  = {53},
  pages   = {2607},
  year    = {2020}
}"""

    def __post_init__(self) -> None:
        if self.cannot:
            raise ValueError(f"cannot run: {self.cannot}")
        self._built(min(self.norms))

    def __reduce__(self) -> Any:
        return make, ("attack", spec(self))  # its class is made, and cannot be imported

    def __call__(self, problem: Problem) -> Tensor:
        return self._propose(problem.unclosed())

    def _propose(self, problem: Problem) -> Tensor:
        try:
            return self._run(problem)
        except _Spent:
            return problem.best
        except Exception as error:
            if len(problem) == 1:
                problem.give_up(torch.ones_like(problem.open), f"foolbox: {one_line(error)}")
                return problem.x
        halves = torch.arange(len(problem), device=problem.x.device).tensor_split(2)
        return torch.cat([self._propose(problem[half]) for half in halves])

    def _run(self, problem: Problem) -> Tensor:
        from foolbox.criteria import Misclassification, TargetedMisclassification

        wanted = (TargetedMisclassification if problem.goal.targeted else Misclassification)(problem.goal.labels)
        attack, model = self._built(problem.threat.norm.name), _Model(problem, self.access)
        with _seeded(problem):
            if self.minimises:
                found: Tensor = attack.run(model, problem.x, wanted)
            else:
                _, found, _ = attack(model, problem.x, wanted, epsilons=problem.threat.eps)
        return found

    def _built(self, norm: str) -> Any:
        """Foolbox's object with these settings."""
        settings = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        if settings.get("init_attack") is not None:
            first = make("attack", settings["init_attack"])
            if not isinstance(first, Foolbox) or not first.minimises:
                raise ValueError(f"init_attack wants a foolbox/... that minimises, not {settings['init_attack']}")
            settings["init_attack"] = first._built(norm)
        if "constraint" in inspect.signature(self.peer).parameters and norm in self.norms:
            settings["constraint"] = norm
        return self.peer(**settings)


class _Spent(Exception):
    """An input may not be asked about any more, which no attack of Foolbox reckons with."""


class _Model:
    """A problem as Foolbox sees a model."""

    data_format = "channels_first"

    def __init__(self, problem: Problem, access: Access) -> None:
        from foolbox.types import Bounds

        self.problem, self.access = problem, access
        self.bounds = Bounds(problem.threat.lower, problem.threat.upper)

    def __call__(self, inputs: Any) -> Any:
        import eagerpy

        x, restore = eagerpy.astensor_(inputs)
        if not bool(self.problem.open.all()):
            raise _Spent
        if self.access != "labels":
            return restore(eagerpy.astensor(self.problem.logits(x.raw)))
        labels = self.problem.labels(x.raw)
        return restore(eagerpy.astensor(F.one_hot(labels.clamp_min(0), self.problem.classes).to(x.raw.dtype)))


@contextmanager
def _seeded(problem: Problem) -> Iterator[None]:
    """Seeds the global generators, which Foolbox draws from, by the problem's noise; afterwards they are as before."""
    import numpy as np

    seed = int(problem.noise.at("foolbox").integers(2**32, problem.x.flatten(1)[:, :1])[0])
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[problem.x.device] if problem.x.is_cuda else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


def _kebab(name: str, peer: Any) -> str:
    """``LInfFMNAttack`` is ``linf-fmn``; ``DDNAttack``, whose distance is l2, is ``l2-ddn``."""
    bare = re.sub(r"^L(\d|[Ii]nf(inity)?)(?=[A-Z])", "", name.removesuffix("Attack"))
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z0-9])|[A-Z][a-z0-9]*", bare)]
    norms = _norms(peer)
    return "-".join([*(norm for norm in norms if len(norms) == 1 and norm not in words), *words])


def _norms(peer: Any) -> frozenset[str]:
    if "constraint" in inspect.signature(peer).parameters:
        return frozenset({"l2", "linf"})
    distance = getattr(object.__new__(peer), "distance", None)
    return frozenset({f"l{distance.p:g}"}) if distance else FLEXIBLE


def _plugin(peer: Any, name: str, version: str) -> type:
    """The class ``peer`` of Foolbox as an attack called ``name``."""
    from foolbox.attacks.base import MinimizationAttack

    module = peer.__module__.rpartition(".")[2]
    cannot = CANNOT.get(peer.__name__, "")
    if NEEDS_NUMBA in peer.__name__ and not find_spec("numba"):
        cannot = "it needs numba, which is not installed (pip install numba)"
    return make_dataclass(
        peer.__name__,
        _settings(peer),
        bases=(Foolbox,),
        namespace={
            "__module__": __name__,
            "__doc__": f"Cannot run: {cannot}." if cannot else _about(peer),
            "name": name,
            "version": version,
            "peer": peer,
            "cannot": cannot,
            "access": "labels" if module in LABELS else "scores" if module in SCORES else "gradients",
            "norms": _norms(peer),
            "minimises": issubclass(peer, MinimizationAttack),
        },
        frozen=True,
    )


def _settings(peer: Any) -> list[Any]:
    hints = get_type_hints(peer.__init__) | {"init_attack": str | None}
    return [
        (name, hints[name], *([] if parameter.default is parameter.empty else [field(default=parameter.default)]))
        for name, parameter in inspect.signature(peer).parameters.items()
        if name not in NO_SETTING
    ]


def _about(peer: Any) -> str:
    """The first paragraph of the class's docstring, and its paper."""
    text = inspect.getdoc(peer) or ""
    summary = " ".join(re.sub(r" *\[#?\w+\]_?", "", text.partition("\n\n")[0]).split())
    papers = re.findall(r"\.\. \[#?\w+\]_?(.+?)(?=\.\. \[|\n\n|\Z)", text, re.DOTALL)
    return "\n\n".join([f"{summary.rstrip('.')} ({peer.__name__}).", *(" ".join(paper.split()) for paper in papers)])
