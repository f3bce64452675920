"""Cells, run chunk by chunk: what is stored is read, what is missing is computed and stored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from robustbench_lite import __version__, probing, registry
from robustbench_lite.certifying import searches
from robustbench_lite.claims import Claims
from robustbench_lite.defended import Defended
from robustbench_lite.entries import Entry, Found, Probe, Proof
from robustbench_lite.evaluation import frozen
from robustbench_lite.outcome import CHUNK, UNSUPPORTED, Certified, Outcome, Probed, Unfinished
from robustbench_lite.planning import Plan
from robustbench_lite.plugins import Attack, Certifier, Crafted, crafted, learns
from robustbench_lite.pool import Lost
from robustbench_lite.store import Cell, Chunk, Store
from robustbench_lite.tasks import Answer, Executor, GivenUp, Span, Station, Task
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import Subject
from robustbench_lite.training import Progress

ROOMY = 3200  # inputs attacked at once where there is a GPU; as often as its memory is too small, it is halved
LESSON: Span = (0, 0)  # stands for what an attack learns first
POLL = 1.0  # seconds after which it is looked again for what another run computes


class Watcher:
    """Is told how a run goes; this one keeps silent."""

    def note(self, text: str) -> None:
        """Something that the person should know."""

    def training(self, defense: str, progress: Progress) -> None:
        """A recipe has made a step."""

    def planned(self, inputs: int) -> None:
        """How many inputs, over all cells, are still to be attacked, certified or read."""

    def advanced(self, defense: str, plugin: str, threat: ThreatModel, inputs: int) -> None:
        """That many more inputs are done."""


SILENT = Watcher()


@dataclass
class Job:
    """A cell of the run: what is asked, and what there is of it so far."""

    number: int
    chain: str
    plugin: Attack | Certifier
    threat: ThreatModel
    adaptive: bool = True
    proves: bool = False
    cell: Cell | None = None  # once its model is made
    learned: Tensor | None = None
    done: list[Chunk] = field(default_factory=list)
    missing: list[Span] = field(default_factory=list)
    untaught: bool = False  # its attack is to learn first
    lost: dict[Span, int] = field(default_factory=dict)  # how often a chunk had no answer
    given_up: dict[Span, str] = field(default_factory=dict)  # chunks for which it is not asked again, and why
    found: Entry | Proof | None = None

    def __str__(self) -> str:
        defense = self.chain if self.cell is None else self.cell.about["defense"]
        return f"{registry.spec(self.plugin)} on {defense}, {self.threat}"


@dataclass(frozen=True)
class Runner:
    """Runs cells, chunk by chunk; an attack that learns does so once a cell.

    ``share`` is among how many a cell is shared out. A chunk may take ``seconds``; with ``isolate`` a process works for
    one cell only.
    """

    station: Station
    store: Store
    claims: Claims
    executor: Executor
    watcher: Watcher
    share: int = 1
    seconds: float | None = None
    isolate: bool = False
    fresh: bool = False
    probing: bool = True
    made: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)  # chunks, by this run

    def run(self, plan: Plan) -> list[Found]:
        """What is found in every cell, and of every model. Chunks that another run has claimed are waited for."""
        jobs = self._jobs(plan)
        told = False
        while left := [job for job in jobs if job.found is None]:
            idle = True
            for task, found in self.executor.run(self._tasks(left)):
                self._take(jobs[task.cell], task, found)
                idle = False
            if idle and (others := sum(len(job.missing) for job in jobs)):
                if not told:
                    self.watcher.note(f"waiting for {others} chunks that another run is computing")
                told = True
                time.sleep(POLL)
        attacked = {(job.chain, job.threat, job.adaptive): job for job in jobs if self.probing and not job.proves}
        probes = [probe for job in attacked.values() if (probe := self._probe(job)) is not None]
        return [*(job.found for job in jobs if job.found is not None), *probes]

    @staticmethod
    def _jobs(plan: Plan) -> list[Job]:
        jobs: list[Job] = []
        for chain, assaults in plan.assaults.items():
            for attack, threat, adaptive in assaults:
                jobs.append(Job(len(jobs), chain, attack, threat, adaptive))
            for certifier, threat in plan.proving:
                jobs.append(Job(len(jobs), chain, certifier, threat, proves=True))
        return jobs

    def _tasks(self, jobs: Sequence[Job]) -> Iterator[Task]:
        """What is to be computed: several chunks at once, but alone what had no answer before."""
        for job in jobs:
            if job.cell is None:
                self._open(job)
            if job.untaught:
                yield self._lesson(job)
                continue
            piece: list[Span] = []
            for span in [*job.missing]:
                if span not in job.lost and not self._mine(job, span):
                    continue
                why = job.given_up.get(span)
                if span in job.lost or why is not None:
                    yield self._task(job, [span], None if why is None else GivenUp(why))
                else:
                    piece.append(span)
                    if len(piece) == self._stride(job):
                        yield self._task(job, piece)
                        piece = []
            if piece:
                yield self._task(job, piece)

    def _stride(self, job: Job) -> int:
        """How many chunks are computed at once; certificates one by one, since that is what an error may cost."""
        return 1 if job.proves else max(1, min(self.station.batch // CHUNK, len(job.missing) // self.share))

    def _task(self, job: Job, spans: list[Span], instead: GivenUp | None = None) -> Task:
        assert job.cell is not None
        return Task(
            job.number,
            job.chain,
            job.cell.identity["model"]["weights"],
            cast(Attack, instead) or job.plugin,
            job.threat,
            job.adaptive,
            job.proves,
            spans,
            seconds=None if self.seconds is None else self.seconds * len(spans),
            group=job.number if self.isolate else 0,
        )

    def _lesson(self, job: Job) -> Task:
        """May take as long as all inputs of the cell."""
        self.watcher.note(f"attack {registry.spec(job.plugin)} learns from training images under {job.threat}")
        task = self._task(job, job.missing)
        return replace(task, spans=[])

    def _open(self, job: Job) -> None:
        """Finds out what there is of a cell."""
        subject, plugin = self.station.subject(job.chain), job.plugin
        search = searches(cast(Certifier, plugin), self.station.radius) if job.proves else None
        cell = job.cell = cell_of(self.station, subject, plugin, job.threat, search, job.adaptive)
        self.store.remember(cell, subject.history)
        if getattr(plugin, "minimises", False):
            self.store.ask(cell, job.threat.eps)
        learner = not job.proves and learns(cast(Attack, plugin))
        if learner and not self.fresh:
            job.learned = self.store.learned(cell)
        for span in spans(self.station):
            stored = None if learner and job.learned is None else self._stored(cell, span)
            if stored is None:
                job.missing.append(span)
            else:
                job.done.append(stored)
        job.untaught = learner and job.learned is None
        if job.learned is not None:
            job.plugin = replace(cast(Any, plugin), learned=job.learned)
        self._advance(job, sum(map(len, job.done)))

    def _probe(self, job: Job) -> Probe | None:
        """What the first chunk shows of the model; nothing where a black box does not answer."""
        subject = self.station.subject(job.chain)
        cell, (start, stop) = probed_of(self.station, subject, job.threat, job.adaptive), spans(self.station)[0]
        found = None if self.fresh else self.store.load(cell, start, stop)
        if not isinstance(found, Probed):
            images, bench = self.station.images, self.station.bench(subject, job.plugin, job.threat, job.adaptive)
            with frozen(subject.model):
                try:
                    found = probing.probe(bench, images.x[:stop], images.y[:stop], torch.arange(stop))
                except Unfinished as error:
                    self.watcher.note(f"{subject.defense} is not audited: {error}")
                    return None
            self.store.save(cell, found)
        return probe_of(cell, found)

    def _stored(self, cell: Cell, span: Span) -> Chunk | None:
        """A chunk that is there; one that had no answer is asked for again, but once a run: cells that differ in an
        eps that is no part of their key share their chunks."""
        ours = self.store.path(cell, *span) in self.made
        stored = self.store.load(cell, *span, self.station.keep_all) if ours or not self.fresh else None
        return stored if isinstance(stored, cell.kind) and (ours or not stored.unfinished) else None

    def _teach(self, job: Job, learned: Tensor) -> None:
        """Kept as soon as it is learned; of two runs at once, what the first has kept counts for both."""
        cell = cast(Cell, job.cell)
        kept = None if self.fresh else self.store.learned(cell)
        if kept is None:
            self.store.learn(cell, learned)
        job.learned, job.untaught = learned if kept is None else kept, False
        job.plugin = replace(cast(Any, job.plugin), learned=job.learned)

    def _mine(self, job: Job, span: Span) -> bool:
        """Whether a chunk is this run's to compute: no other run does, or has done since."""
        cell = cast(Cell, job.cell)
        if not self.claims.take(self.store.path(cell, *span)):
            return False
        stored = self._stored(cell, span)
        if stored is not None:
            self._done(job, span, stored)
            self._advance(job, len(stored))
        return stored is None

    def _take(self, job: Job, task: Task, found: Answer) -> None:
        """Keeps what was learned, or stores what was computed, chunk by chunk."""
        if isinstance(found, Lost):
            self._lose(job, task, found)
        elif isinstance(found, np.ndarray):
            self._teach(job, torch.from_numpy(found))
        else:
            for span in task.spans:
                chunk = found.part(*span)
                self.store.save(cast(Cell, job.cell), chunk)
                self.made.add(self.store.path(cast(Cell, job.cell), *span))
                self._done(job, span, chunk)
            self._advance(job, len(found))

    def _lose(self, job: Job, task: Task, lost: Lost) -> None:
        """Chunks computed together are tried again one by one; one whose process died is tried a second time. Without
        what its attack was to learn a cell is given up."""
        if isinstance(task.plugin, GivenUp):
            raise ValueError(f"{job}: without an attack, too, there is {lost.why}")
        tried = task.spans or [LESSON]
        for span in tried:
            job.lost[span] = job.lost.get(span, 0) + 1
            if len(tried) == 1 and (lost.stopped or job.lost[span] > 1):
                job.given_up[span] = lost.why
        what = f"inputs {task.spans[0][0]} to {task.spans[-1][1] - 1}" if task.spans else "learning"
        end = "left unknown" if tried[0] in job.given_up else "tried again"
        self.watcher.note(f"{job}, {what}: {lost.why}; {end}")
        if LESSON in job.given_up:
            job.untaught, job.given_up = False, dict.fromkeys(job.missing, f"learning: {lost.why}")

    def _done(self, job: Job, span: Span, chunk: Chunk) -> None:
        job.done.append(chunk)
        job.missing.remove(span)
        self.claims.give_back(self.store.path(cast(Cell, job.cell), *span))

    def _advance(self, job: Job, inputs: int) -> None:
        """Says how far a cell is, and what was found where that is all."""
        cell = cast(Cell, job.cell)
        self.watcher.advanced(cell.about["defense"], registry.spec(job.plugin), job.threat, inputs)
        if job.missing:
            return
        if not job.proves:
            entry = entry_of(cell, job.threat, Outcome.join(cast(Any, job.done)))
            job.found = entry if job.learned is None else replace(entry, learned=job.learned.float().numpy())
            return
        job.found = proof = proof_of(cell, Certified.join(cast(Any, job.done)))
        for reason in dict.fromkeys(proof.certified.reason[proof.certified.status == UNSUPPORTED].tolist()):
            self.watcher.note(f"certifier {proof.certifier} does not cover {proof.defense}: {reason}")


def spans(station: Station) -> list[Span]:
    """The chunks of rows that every cell has."""
    count = len(station.images)
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def cell_of(
    station: Station,
    subject: Subject,
    plugin: Attack | Certifier,
    threat: ThreatModel,
    search: bool | None = None,
    adaptive: bool = True,
) -> Cell:
    """An attack's cell; a certifier's where ``search`` says whether it searches for radii."""
    kind = "attack" if search is None else "certifier"
    identity = {
        **_identity(station, subject, threat, adaptive),
        kind: {**registry.identity(plugin), "origin": registry.origin(type(plugin))},
        "eps": None if getattr(plugin, "minimises", False) else threat.eps,
        **({"target": station.target, "precision": station.precision} if search is None else {"search": search}),
        **({"layout": station.layout} if search is None and station.layout != "as-built" else {}),
    }
    known = subject.model if adaptive else subject.model.model
    if isinstance(known, Defended) and known.stochastic and getattr(plugin, "access", None) == "gradients":
        identity["eot"] = station.eot or known.draws
    if search is None and learns(cast(Attack, plugin)):
        identity["training"] = station.workshop.training.fingerprint
    if search is None and crafted(cast(Attack, plugin)):
        identity["source"] = station.source(cast(Crafted, plugin).source, plugin.name).identity
    return Cell(identity, {**_about(station, subject, threat), kind: registry.spec(plugin)})


def probed_of(station: Station, subject: Subject, threat: ThreatModel, adaptive: bool) -> Cell:
    """A probe's cell."""
    identity = {**_identity(station, subject, threat, adaptive), "probe": probing.VERSION}
    return Cell(identity, {**_about(station, subject, threat), "classes": station.images.classes})


def _identity(station: Station, subject: Subject, threat: ThreatModel, adaptive: bool) -> dict[str, Any]:
    return {
        "data": station.images.fingerprint,
        "model": subject.identity,
        "norm": threat.norm.name,
        "eps": threat.eps,
        "range": [threat.lower, threat.upper],
        "seed": station.seed,
        "precision": "float32",
        **({} if adaptive else {"adaptive": False}),
    }


def _about(station: Station, subject: Subject, threat: ThreatModel) -> dict[str, Any]:
    return {
        "dataset": station.images.name,
        "defense": subject.defense,
        "model": subject.architecture,
        "parameters": subject.parameters,
        "threshold": subject.model.threshold,
        "draws": subject.model.draws if subject.model.stochastic else None,
        "eps": threat.eps,
        "version": __version__,
        "torch": torch.__version__,
        "shape": list(station.images.shape),
    }


def entry_of(cell: Cell, threat: ThreatModel, outcome: Outcome) -> Entry:
    about = cell.about
    limit = threat.norm.limit(threat.eps, torch.empty(1, *about["shape"]))
    target, eot, precision, layout = (cell.identity.get(name) for name in ("target", "eot", "precision", "layout"))
    ways = [f" to {target}"] * (target is not None) + [f" (eot {eot})"] * (eot not in (None, about["draws"]))
    ways += [f" ({precision})"] * (precision != "float32")
    ways += [f" ({layout})"] * (layout is not None)
    return Entry(
        **_setting(cell, threat.eps),
        attack="".join([about["attack"], *ways]),
        adaptive=cell.identity.get("adaptive", True),
        threshold=about["threshold"],
        draws=about["draws"],
        outcome=outcome if cell.identity["eps"] is not None else outcome.within(limit),
    )


def proof_of(cell: Cell, certified: Certified) -> Proof:
    setting = _setting(cell, cell.identity["eps"])
    return Proof(**setting, certifier=cell.about["certifier"], certified=certified)


def probe_of(cell: Cell, probed: Probed) -> Probe:
    setting, adaptive = _setting(cell, cell.identity["eps"]), cell.identity.get("adaptive", True)
    return Probe(**setting, adaptive=adaptive, probed=probed, classes=cell.about["classes"])


def _setting(cell: Cell, eps: float) -> dict[str, Any]:
    return {
        **{name: cell.about[name] for name in ("dataset", "defense", "model", "parameters")},
        **{name: cell.identity[name] for name in ("norm", "seed")},
        "eps": eps,
        "subject": " ".join(place_of(cell)[:2]),
        "cell": cell,
    }


def place_of(cell: Cell) -> tuple[str, str, str, int]:
    """Data, model, norm and seed of a cell: where an eps that was asked about one attack counts for all."""
    model = json.dumps(cell.identity["model"], sort_keys=True)
    return cell.identity["data"], model, cell.identity["norm"], cell.identity["seed"]
