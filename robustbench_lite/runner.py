"""Cells, run chunk by chunk: what is stored is read, what is missing is computed and stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from robustbench_lite import __version__, data, leaderboard, registry
from robustbench_lite.certifying import Court, searches
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import Bench, Target, check, checked
from robustbench_lite.outcome import CHUNK, UNSUPPORTED, Certified, Outcome, Rows
from robustbench_lite.plugins import Attack, Certifier, Crafted, Learner, crafted, learns
from robustbench_lite.store import Cell, Store
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import Subject
from robustbench_lite.training import Progress

Found = TypeVar("Found", bound=Rows)

BATCH = 400  # inputs attacked at once: whole chunks, and whole multiples of what a physical batch is padded to


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


@dataclass(frozen=True)
class Runner:
    """Runs cells, chunk by chunk, on one set of images; an attack that learns does so once a cell."""

    images: data.Images
    training: data.Images | None  # where an attack learns from it
    source: Callable[[str, str], Subject]  # by its spec, and what asks for it
    store: Store
    seed: int
    target: Target | None
    batch: int
    fresh: bool
    keep_all: bool
    watcher: Watcher

    def attack(self, subject: Subject, attack: Attack, threat: ThreatModel, adaptive: bool) -> leaderboard.Entry:
        cell = self._cell(subject, attack, threat, adaptive=adaptive)
        if getattr(attack, "minimises", False):
            self.store.ask(cell, threat.eps)
        learned = self.store.learned(cell) if learns(attack) and not self.fresh else None
        done, missing = self._stored(Outcome, cell, anew=self.fresh or (learns(attack) and learned is None))
        self._advance(subject, attack, threat, sum(map(len, done)))
        if missing:
            classes = self._check(subject.model, threat)
            sources = checked(
                lambda spec: self.source(spec, attack.name).model, classes, self.images.x, self.images.y, threat
            )
            bench = Bench(
                subject.model, threat, classes, self.seed, self.target, self.batch, self.keep_all, adaptive, sources
            )
            self._check(bench.known, threat)
            if learns(attack):
                learned = self._learned(cell, bench, attack) if learned is None else learned
                attack = replace(cast(Any, attack), learned=learned)
            for at in range(0, len(missing), bench.stride // CHUNK):
                piece = missing[at : at + bench.stride // CHUNK]
                rows = torch.cat([torch.arange(*span) for span in piece])
                outcome = Outcome.join(bench.run(attack, self.images.x[rows], self.images.y[rows], rows))
                for span in piece:
                    done.append(outcome.part(*span))
                    self.store.save(cell, done[-1])
                self._advance(subject, attack, threat, len(rows))
        entry = entry_of(cell, threat, Outcome.join(done))
        return entry if learned is None else replace(entry, learned=learned.float().numpy())

    def certify(self, subject: Subject, certifier: Certifier, threat: ThreatModel, radius: bool) -> leaderboard.Proof:
        """A chunk at a time, since that is what an error of the certifier may cost."""
        cell = self._cell(subject, certifier, threat, searches(certifier, radius))
        done, missing = self._stored(Certified, cell, self.fresh)
        self._advance(subject, certifier, threat, sum(map(len, done)))
        if missing:
            self._check(subject.model, threat)
            court = Court(subject.model, certifier, threat, self.seed, radius)
            for span in missing:
                rows = torch.arange(*span)
                done.append(court.hear(self.images.x[rows], self.images.y[rows], rows))
                self.store.save(cell, done[-1])
                self._advance(subject, certifier, threat, len(rows))
        proof = proof_of(cell, Certified.join(done))
        for reason in dict.fromkeys(proof.certified.reason[proof.certified.status == UNSUPPORTED].tolist()):
            self.watcher.note(f"certifier {proof.certifier} does not cover {subject.defense}: {reason}")
        return proof

    def _stored(self, kind: type[Found], cell: Cell, anew: bool) -> tuple[list[Found], list[tuple[int, int]]]:
        """The chunks that are there, and the spans of rows that are not."""
        stops = [*range(CHUNK, len(self.images), CHUNK), len(self.images)]
        done: list[Found] = []
        missing: list[tuple[int, int]] = []
        for stop in stops:
            span = (stop - 1) // CHUNK * CHUNK, stop
            stored = None if anew else self.store.load(cell, *span, self.keep_all)
            if isinstance(stored, kind):
                done.append(stored)
            else:
                missing.append(span)
        return done, missing

    def _check(self, model: Defended, threat: ThreatModel) -> int:
        """How many classes the model knows, which are no more than a data set of ours has."""
        classes = check(model, self.images.x, self.images.y, threat)
        if classes > self.images.classes and self.images.name in data.SOURCES:
            raise ValueError(f"the model knows {classes} classes, but {self.images.name} has {self.images.classes}")
        return classes

    def _learned(self, cell: Cell, bench: Bench, attack: Learner) -> Tensor:
        """Kept as soon as it is learned; of two runs at once, what the first has kept counts for both."""
        training = cast(data.Images, self.training)
        self.watcher.note(f"attack {registry.spec(attack)} learns from training images under {bench.threat}")
        learned = cast(Tensor, bench.fit(attack, training.x, training.y).learned)
        kept = None if self.fresh else self.store.learned(cell)
        if kept is None:
            self.store.learn(cell, learned)
        return learned.cpu() if kept is None else kept

    def _advance(self, subject: Subject, plugin: Attack | Certifier, threat: ThreatModel, inputs: int) -> None:
        self.watcher.advanced(subject.defense, registry.spec(plugin), threat, inputs)

    def _cell(
        self,
        subject: Subject,
        plugin: Attack | Certifier,
        threat: ThreatModel,
        search: bool | None = None,
        adaptive: bool = True,
    ) -> Cell:
        """An attack's cell; a certifier's where ``search`` says whether it searches for radii."""
        kind = "attack" if search is None else "certifier"
        identity = {
            "data": self.images.fingerprint,
            "model": subject.identity,
            kind: {**registry.identity(plugin), "origin": registry.origin(type(plugin))},
            "norm": threat.norm.name,
            "eps": None if getattr(plugin, "minimises", False) else threat.eps,
            "range": [threat.lower, threat.upper],
            **({"target": self.target} if search is None else {"search": search}),
            "seed": self.seed,
            "precision": "float32",
            **({} if adaptive else {"adaptive": False}),
        }
        if search is None and learns(cast(Attack, plugin)):
            identity["training"] = cast(data.Images, self.training).fingerprint
        if search is None and crafted(cast(Attack, plugin)):
            identity["source"] = self.source(cast(Crafted, plugin).source, plugin.name).identity
        about = {
            "dataset": self.images.name,
            "defense": subject.defense,
            "model": subject.architecture,
            "parameters": subject.parameters,
            "threshold": subject.model.threshold,
            kind: registry.spec(plugin),
            "eps": threat.eps,
            "version": __version__,
            "torch": torch.__version__,
            "shape": list(self.images.shape),
        }
        return Cell(identity, about)


def entry_of(cell: Cell, threat: ThreatModel, outcome: Outcome) -> leaderboard.Entry:
    about = cell.about
    limit = threat.norm.limit(threat.eps, torch.empty(1, *about["shape"]))
    target = cell.identity["target"]
    return leaderboard.Entry(
        **_setting(cell, threat.eps),
        attack=about["attack"] if target is None else f"{about['attack']} to {target}",
        adaptive=cell.identity.get("adaptive", True),
        threshold=about.get("threshold"),
        outcome=outcome if cell.identity["eps"] is not None else outcome.within(limit),
    )


def proof_of(cell: Cell, certified: Certified) -> leaderboard.Proof:
    setting = _setting(cell, cell.identity["eps"])
    return leaderboard.Proof(**setting, certifier=cell.about["certifier"], certified=certified)


def _setting(cell: Cell, eps: float) -> dict[str, Any]:
    return {
        **{name: cell.about[name] for name in ("dataset", "defense", "model", "parameters")},
        **{name: cell.identity[name] for name in ("norm", "seed")},
        "eps": eps,
        "subject": " ".join(place_of(cell)[:2]),
    }


def place_of(cell: Cell) -> tuple[str, str, str, int]:
    """Data, model, norm and seed of a cell: where an eps that was asked about one attack counts for all."""
    model = json.dumps(cell.identity["model"], sort_keys=True)
    return cell.identity["data"], model, cell.identity["norm"], cell.identity["seed"]
