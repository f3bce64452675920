"""What a run still has to do, and roughly how long it takes, before anything is run."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite import registry
from robustbench_lite.certifying import Court
from robustbench_lite.data import Images
from robustbench_lite.defended import Defended, Precision, ask, computing, device_of
from robustbench_lite.evaluation import BATCH, Target, check, frozen
from robustbench_lite.layout import Layout
from robustbench_lite.matrix import prepare
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import CHUNK, Certified, Outcome, Rows
from robustbench_lite.planning import Assault
from robustbench_lite.plugins import Certifier, learns
from robustbench_lite.runner import SILENT, Watcher, cell_of, spans
from robustbench_lite.store import Cell, Store
from robustbench_lite.tasks import Span, Station
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import Subject, Untrained

SAMPLE = 16  # inputs on which queries are counted: the fewest that a model is asked at once
SMALL = 0.01  # the share of eps that does not fool what they are counted on

Found = TypeVar("Found", bound=Rows)


@dataclass(frozen=True)
class Ahead:
    """A cell before it is run: how many of its inputs are ``missing`` in the store, and about how many ``seconds`` they
    take; None where nothing can be said, and ``why``."""

    defense: str
    plugin: str
    threat: ThreatModel
    inputs: int
    missing: int
    seconds: float | None = None
    why: str = ""


def forecast(
    *,
    seed: int,
    out: str | Path,
    target: Target | None = None,
    fresh: bool = False,
    eot: int | None = None,
    precision: Precision = "float32",
    layout: Layout = "as-built",
    threads: int = 1,
    watcher: Watcher = SILENT,
    **asked: Any,
) -> Iterator[Ahead]:
    """The cells of what :func:`robustbench_lite.matrix.prepare` is asked; trains nothing and writes nothing.

    An attack's queries an input are those of what is stored of its cell, or else are counted on ``SAMPLE`` inputs of a
    linear model, under an eps so small that they hold; they are multiplied by what a query of each defense takes.
    Attacks that ask the defense nothing are timed on the first defense, certifiers on every one.

    Raises:
        ValueError: for anything that cannot be run as asked; in one line.
    """
    images, workshop, wanted = prepare(**asked, watcher=watcher)
    workshop = replace(workshop, trains=False)
    station = Station(workshop, images, seed, target, BATCH, False, False, threads, eot, precision, layout)
    scout = _Scout(station, Store(Path(out), watcher.note), fresh, watcher, _linear(images))
    with computing(threads):
        for chain, assaults in wanted.assaults.items():
            cells = [*((one.attack, one.threat) for one in assaults), *wanted.proving]
            if not cells:
                continue
            try:
                subject = workshop.subject(chain)
            except Untrained as error:
                for plugin, threat in cells:
                    spec = registry.spec(plugin)
                    yield Ahead(chain, spec, threat, len(images), len(images), why=str(error))
                continue
            with frozen(subject.model):
                check(subject.model, images.x, images.y, cells[0][1])
                pace = Pace.of(subject.model, images.x, precision)
                yield from (scout.attack(subject, pace, assault) for assault in assaults)
                yield from (scout.certify(subject, *pair) for pair in wanted.proving)


def memory(device: torch.device) -> int | None:
    """The most bytes that this process has held on a device so far, so after a look at every model what one that works
    takes; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


@dataclass(frozen=True)
class Pace:
    """Seconds that a model takes for an input, a chunk at a time."""

    forward: float
    backward: float

    @classmethod
    def of(cls, model: Defended, x: Tensor, precision: Precision) -> "Pace":
        x = x[:CHUNK].to(device_of(model))

        def seconds(backward: bool) -> float:
            began, given = time.perf_counter(), x.clone().requires_grad_(backward)
            answers = ask(model, given, len(x), backward, Noise(0, torch.arange(len(x))), precision)
            (torch.autograd.grad(answers.sum(), given)[0] if backward else answers).cpu()
            return (time.perf_counter() - began) / len(x)

        if model.access != "gradients":
            return cls(seconds(False), 0.0)
        seconds(True)  # the first is slower than the rest
        with torch.no_grad():
            forward = seconds(False)
        return cls(forward, max(0.0, seconds(True) - forward))

    def __call__(self, outcome: Outcome) -> float:
        """What an attack would take for an input that did to others as ``outcome`` says."""
        forwards, backwards = float(outcome.forwards.mean()), float(outcome.backwards.mean())
        return forwards * self.forward + backwards * self.backward if forwards else float(outcome.seconds.mean())


def _linear(images: Images) -> Defended:
    """Takes an input for the class whose mean image is nearest; costs next to nothing to ask."""
    x = images.x.flatten(1)
    one_hot = nn.functional.one_hot(images.y, images.classes).float()
    means = one_hot.T @ x / one_hot.sum(0).clamp(min=1).unsqueeze(1)
    layer = nn.Linear(x.shape[1], images.classes)
    layer.load_state_dict({"weight": 2 * means, "bias": -means.square().sum(1)})
    return Defended(nn.Sequential(nn.Flatten(), layer)).eval().requires_grad_(False)


@dataclass(frozen=True)
class _Scout:
    """Looks at cells one by one, and remembers what it tried."""

    station: Station
    store: Store
    fresh: bool
    watcher: Watcher
    linear: Defended
    tried: dict[str, Rows] = field(default_factory=dict)

    def attack(self, subject: Subject, pace: Pace, assault: Assault) -> Ahead:
        attack, threat, adaptive = assault
        try:
            cell = cell_of(self.station, subject, attack, threat, adaptive=adaptive)
        except Untrained as error:  # its source
            return replace(self._cell(subject, attack, threat, None), why=str(error))
        learner = learns(attack)
        anew = self.fresh or (learner and self.store.learned(cell) is None)
        done, missing = self._stored(Outcome, cell, anew)
        about = self._cell(subject, attack, threat, missing)
        if learner and missing:
            return replace(about, why="it learns first")

        def sample() -> Outcome:
            small = replace(threat, eps=1.0 if threat.norm.name == "l0" else SMALL * threat.eps)
            bench = self.station.bench(subject, attack, threat, adaptive)
            bench = replace(bench, model=self.linear, threat=small, classes=self.station.images.classes, adaptive=True)
            x, _, rows = self._first()
            return bench.run(attack, x, self.linear(x).argmax(1), rows)[0]

        averaged = subject.model.stochastic and attack.access == "gradients" and not done
        draws = (self.station.eot or subject.model.draws) if averaged else 1
        like = self._like(f"{about.plugin} under {threat}", done, sample)
        return replace(about, seconds=about.missing * draws * pace(like))

    def certify(self, subject: Subject, certifier: Certifier, threat: ThreatModel) -> Ahead:
        cell = cell_of(self.station, subject, certifier, threat, search=False)
        done, missing = self._stored(Certified, cell, self.fresh)
        about = self._cell(subject, certifier, threat, missing)

        def sample() -> Certified:
            return Court(subject.model, certifier, threat, self.station.seed).hear(*self._first())

        # On every model: what cheap bounds leave open takes a hundred times as long.
        like = self._like(f"{about.plugin} under {threat} on {about.defense}", done, sample)
        return replace(about, seconds=about.missing * float(like.seconds.mean()))

    def _stored(self, kind: type[Found], cell: Cell, anew: bool) -> tuple[list[Found], list[Span]]:
        """The chunks that are there, and the rows of those that are not."""
        done: list[Found] = []
        missing: list[Span] = []
        for span in spans(self.station):
            stored = None if anew else self.store.load(cell, *span)
            if isinstance(stored, kind) and not stored.unfinished:
                done.append(stored)
            else:
                missing.append(span)
        return done, missing

    def _cell(self, subject: Subject, plugin: object, threat: ThreatModel, missing: list[Span] | None) -> Ahead:
        inputs = len(self.station.images)
        left = inputs if missing is None else sum(stop - start for start, stop in missing)
        return Ahead(subject.defense, registry.spec(plugin), threat, inputs, left)

    def _like(self, key: str, done: list[Found], sample: Callable[[], Found]) -> Found:
        """What a cell's inputs are taken to be like: those that are stored, else those that are tried."""
        if done:
            self.tried.setdefault(key, type(done[0]).join(done))
            return type(done[0]).join(done)
        if key not in self.tried:
            self.watcher.note(f"trying {key}, on a few inputs")
            self.tried[key] = sample()
        return cast(Found, self.tried[key])

    def _first(self) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.station.images.x[:SAMPLE], self.station.images.y[:SAMPLE]
        return x, y, torch.arange(len(x))
