"""Chunks of a cell as tasks, and the station that computes them: in this process, or in others."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite import data, registry
from robustbench_lite.certifying import Court
from robustbench_lite.defended import Defended, Precision
from robustbench_lite.evaluation import Bench, Target, check, checked, frozen, laid_out
from robustbench_lite.layout import Layout
from robustbench_lite.norms import NORMS
from robustbench_lite.outcome import Outcome, Unfinished
from robustbench_lite.plugins import Attack, Certifier, Learner, Plugin
from robustbench_lite.pool import Lost, packed
from robustbench_lite.problem import Access
from robustbench_lite.store import Chunk
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import Subject, Workshop
from robustbench_lite.wording import one_line, require_one_of

Span = tuple[int, int]  # of rows: from, and up to
Answer = Chunk | NDArray[Any] | Lost  # an array is what was learned


@dataclass(frozen=True)
class Task:
    """Chunks of the cell of that number, computed at once: by an attack, or by a certifier that ``proves``. Without
    chunks it is a lesson: what the attack learns from training images."""

    cell: int
    chain: str
    weights: str  # their hash, which the model is to have
    plugin: Attack | Certifier
    threat: ThreatModel
    adaptive: bool
    proves: bool
    spans: Sequence[Span]
    seconds: float | None = None
    group: int = 0


class Executor(Protocol):
    """Who computes tasks; in whatever order, and as many at once as it likes."""

    @property
    def size(self) -> int:
        """How many at once; 0 where that is not known."""

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]: ...


@dataclass(frozen=True)
class Station:
    """All that tasks are computed with. It keeps the models that it made: of defenses the last, of sources all."""

    workshop: Workshop
    images: data.Images
    seed: int
    target: Target | None
    batch: int
    keep_all: bool
    radius: bool
    threads: int
    eot: int | None = None
    precision: Precision = "float32"
    layout: Layout = "as-built"
    kept: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_one_of("precision", self.precision, Precision)
        require_one_of("layout", self.layout, Layout)
        if self.seed.bit_length() > 63:  # tables could not hold it
            raise ValueError(f"seed must have less than 64 bits, not {self.seed}")
        if self.threads < 1:
            raise ValueError(f"threads must be 1 or more, not {self.threads}")
        if self.eot is not None and self.eot < 1:
            raise ValueError(f"eot must be 1 or more, not {self.eot}")

    def __call__(self, task: Task) -> Callable[[], Answer]:
        """Sets a task up; what is returned computes it.

        Raises:
            ValueError: where the model does not fit, or is not the one that the task is about.
        """
        subject = self.subject(task.chain)
        if subject.identity["weights"] != task.weights:
            raise ValueError(f"model {subject.architecture} comes out otherwise each time that it is made")
        if task.cell not in self.kept.get("bench", ()):
            made = self.bench(subject, task.plugin, task.threat, task.adaptive)
            self.kept["bench"] = {task.cell: made}
        bench = cast(Bench, self.kept["bench"][task.cell])
        if not task.spans:
            return partial(self._learn, subject, bench, cast(Learner, task.plugin), self.workshop.training)
        rows = torch.cat([torch.arange(*span) for span in task.spans])
        batch = self.images.x[rows], self.images.y[rows], rows

        def compute() -> Answer:
            with frozen(subject.model):
                if task.proves:
                    certifier = cast(Certifier, task.plugin)
                    return Court(subject.model, certifier, task.threat, self.seed, self.radius).hear(*batch)
                return Outcome.join(bench.run(cast(Attack, task.plugin), *batch))

        return compute

    def _learn(self, subject: Subject, bench: Bench, attack: Learner, training: data.Images) -> Answer | Lost:
        with frozen(subject.model):
            try:
                return cast(Tensor, bench.fit(attack, training.x, training.y).learned).cpu().numpy()
            except Exception as error:  # whatever a plugin raises costs its own cell only
                return Lost(f"it learned nothing: {one_line(error)}", stopped=True)

    def subject(self, chain: str) -> Subject:
        if chain not in self.kept.get("subject", ()):
            self.kept["subject"] = {chain: self.workshop.subject(chain)}
        return cast(Subject, self.kept["subject"][chain])

    def source(self, spec: str, asker: str) -> Subject:
        """See :meth:`Workshop.source`."""
        if (spec, asker) not in self.kept:
            self.kept[spec, asker] = self.workshop.source(spec, asker)
        return cast(Subject, self.kept[spec, asker])

    def bench(self, subject: Subject, plugin: Plugin, threat: ThreatModel, adaptive: bool) -> Bench:
        """Where a cell's attack is run, once it has been seen that the model fits."""
        x, y = self.images.x, self.images.y
        with frozen(subject.model):
            classes = self._check(subject.model, threat)
            sources = checked(lambda spec: self.source(spec, plugin.name).model, classes, x, y, threat, self.precision)
            settings = self.seed, self.target, self.batch, self.keep_all, adaptive
            bench = Bench(subject.model, threat, classes, *settings, sources, self.eot, self.precision)
            if not adaptive:
                self._check(bench.known, threat)
            return replace(bench, asked=self._asked(bench.known, threat)) if hasattr(plugin, "access") else bench

    def packed(self) -> Callable[[int], Station]:
        """What makes this station again in a process of that number.

        Raises:
            ValueError: where something of it cannot be handed over.
        """
        images = replace(self.images, x=self.images.x.clone(), y=self.images.y.clone())  # a view carries the whole
        return partial(
            _unpacked, registry.files(), packed(replace(self, workshop=self.workshop.abroad(), images=images))
        )

    def _asked(self, model: Defended, threat: ThreatModel) -> Defended | None:
        """Who answers attacks in the model's place, if anybody does; the last is remembered."""
        if model not in self.kept.get("asked", ()):
            laid = laid_out(model, self.layout, self.images.x, self.images.y, threat, self.precision)
            self.kept["asked"] = {model: laid}
        return cast(Defended | None, self.kept["asked"][model])

    def _check(self, model: Defended, threat: ThreatModel) -> int:
        """How many classes the model knows, which are no more than a data set of ours has; the last is remembered."""
        if model not in self.kept.get("checked", ()):
            self.kept["checked"] = {model: check(model, self.images.x, self.images.y, threat, self.precision)}
        classes: int = self.kept["checked"][model]
        if classes > self.images.classes and self.images.name in data.SOURCES:
            raise ValueError(f"the model knows {classes} classes, but {self.images.name} has {self.images.classes}")
        return classes


def _unpacked(files: Mapping[Path, str], station: bytes, number: int) -> Station:
    for file, sha256 in files.items():
        if registry.load_file(file) != sha256:
            raise ValueError(f"plugin file {file} was changed after the run began")
    made = cast(Station, pickle.loads(station))
    torch.set_num_threads(made.threads)
    device = made.workshop.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", number % torch.cuda.device_count())
    return replace(made, workshop=replace(made.workshop, device=device))


@dataclass(frozen=True)
class Here:
    """Computes one task after the other in this process."""

    station: Station
    size: int = 1

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
        for task in tasks:
            yield task, self.station(task)()


@dataclass(frozen=True)
class GivenUp:
    """Stands in for an attack or a certifier that gave no answer: its inputs end unknown, with the reason."""

    why: str

    name: ClassVar[str] = "given-up"
    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = frozenset(NORMS)

    def __call__(self, *_: object) -> Tensor:
        raise Unfinished(self.why)
