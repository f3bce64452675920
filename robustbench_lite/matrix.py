"""Every attack against every defense: planned, run chunk by chunk, stored, and read back as tables."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite import __version__, audit, data, leaderboard, probing, registry
from robustbench_lite.certifying import Court, searches
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import ERROR, Bench, Target, check, checked, frozen
from robustbench_lite.norms import NORMS
from robustbench_lite.outcome import CHUNK, UNKNOWN, UNSUPPORTED, Certified, Outcome, Probed, Rows
from robustbench_lite.planning import Plan, plan
from robustbench_lite.plugins import Attack, Certifier, Crafted, Learner, crafted, learns
from robustbench_lite.store import Cell, Store
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import AS_IS, Inputs, Subject, Workshop
from robustbench_lite.training import Progress

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Found = TypeVar("Found", bound=Rows)
Tested = TypeVar("Tested", Attack, Certifier)

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
class Results:
    """What a benchmark found, as tables; every figure is derived from :meth:`rows` and :meth:`certified_rows`."""

    entries: tuple[leaderboard.Entry, ...]
    proofs: tuple[leaderboard.Proof, ...] = ()
    probes: tuple[leaderboard.Probe, ...] = ()

    def leaderboard(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.leaderboard`."""
        return leaderboard.leaderboard(self.entries, self.proofs, audit.flags(self.findings))

    def matrix(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.matrix`."""
        return leaderboard.matrix(self.entries, self.proofs)

    def rows(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.rows`."""
        return leaderboard.rows(self.entries)

    def certificates(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.certificates`."""
        return leaderboard.certificates(self.proofs)

    def certified_rows(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.rows`."""
        return leaderboard.rows(self.proofs)

    def violations(self) -> list[str]:
        """See :func:`robustbench_lite.leaderboard.violations`."""
        return leaderboard.violations(self.entries, self.proofs)

    @cached_property
    def findings(self) -> list[audit.Finding]:
        """See :func:`robustbench_lite.audit.findings`."""
        return audit.findings(self.entries, self.probes)

    def audit(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.audit.table`."""
        return audit.table(self.findings)

    @property
    def unprobed(self) -> list[str]:
        """The defenses and threat models that were attacked, and not probed."""
        lines = {probe.line for probe in self.probes}
        bare = [entry for entry in self.entries if entry.line not in lines]
        return list(dict.fromkeys(f"{entry.defense}, {entry.norm} {entry.eps:g}" for entry in bare))

    def to_csv(self, path: str | Path) -> None:
        """Writes the leaderboard."""
        write_csv(self.leaderboard(), Path(path))

    @property
    def unknown(self) -> int:
        """How many inputs, over all leaderboard rows, are of unknown status."""
        return int(self.leaderboard()["unknown"].sum())

    def unknown_reasons(self) -> dict[str, int]:
        """Why inputs are of unknown status: how many attacks on them ended so, where the leaderboard counts any, and
        how many certificates did that failed or were refused."""
        counts: Counter[str] = Counter()
        if self.unknown:
            for entry in self.entries:
                counts.update(entry.outcome.reason[entry.outcome.status == UNKNOWN].tolist())
        for proof in self.proofs:
            reasons = proof.certified.reason[proof.certified.status == UNKNOWN].tolist()
            counts.update(reason for reason in reasons if reason.startswith(ERROR))
        del counts[""]
        return dict(counts.most_common())

    def save_patch(self, path: str | Path) -> str:
        """Writes the first patch that an attack has learned as PNG, a pixel a pixel; says which it is.

        Raises:
            ValueError: where there is none, or none that is an image, or the file cannot be written.
        """
        from PIL import Image

        entries = [entry for entry in self.entries if entry.learned is not None]
        if not entries:
            raise ValueError("there is no patch to save: none of the attacks has learned one")
        first, count = entries[0], len(entries)
        levels = np.rint(255 * np.clip(cast("NDArray[np.float32]", first.learned), 0, 1)).astype(np.uint8)
        if levels.ndim != 3 or len(levels) not in (1, 3) or not levels.size:
            raise ValueError(f"what {first.attack} has learned is no image that PNG can hold: {levels.shape}")
        with _replacing(Path(path)) as part:
            Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(part, "png")
        which = f"{first.attack} on {first.defense}, {first.norm} {first.eps:g}"
        return which if count == 1 else f"{which} (the first of {count} patches)"

    def save_adversarials(self, path: str | Path) -> None:
        """Writes the adversarial images that are kept, ``x``, and what each is: ``row``, ``defense``, ``adaptive``,
        ``attack``, ``norm``, ``eps``."""
        columns: dict[str, Any] = {
            name: np.concatenate([np.full(len(entry.outcome.imaged), getattr(entry, name)) for entry in self.entries])
            for name in ("defense", "adaptive", "attack", "norm", "eps")
        }
        columns["x"] = np.concatenate([entry.outcome.images for entry in self.entries])
        columns["row"] = np.concatenate([entry.outcome.imaged for entry in self.entries])
        with _replacing(Path(path)) as part, part.open("wb") as file:
            np.savez_compressed(file, **columns)


def benchmark(
    attacks: str | Sequence[str | Attack] = "pgd",
    defenses: str | Sequence[str] | None = None,
    dataset: str = "mnist",
    threats: Sequence[str | ThreatModel] | None = None,
    *,
    n: int | None = 1000,
    seed: int = 0,
    model: str | nn.Module | None = None,
    weights: str | Path | None = None,
    inputs: Inputs = AS_IS,
    target: Target | None = None,
    adaptive: Literal["on", "off", "both"] = "on",
    device: str = "auto",
    batch: int | None = None,
    data_dir: str | Path | None = None,
    out: str | Path = "runs",
    fresh: bool = False,
    keep_all: bool = False,
    certifiers: str | Sequence[str | Certifier] = (),
    radius: bool = False,
    probe: bool = True,
    watcher: Watcher = SILENT,
) -> Results:
    """Runs every attack against every defense and stores the results, so that a second call only reads them.

    ``attacks`` and ``defenses`` are specs such as ``"pgd:steps=100"`` (attacks may be plugin objects; ``"all"`` means
    every built-in one; by default ``madry``, or the user's own model, is defended), ``threats`` such as
    ``"linf:8/255"``; by default each attack runs under linf, or else its own first norm, at the data set's customary
    eps. The first ``n`` test images are attacked (None: all). ``keep_all`` keeps every adversarial image.
    ``adaptive`` says whether attacks know a defense's last wrapper, are blind to it (``off``), or are run both ways.
    ``certifiers``, specs or objects too, then prove what they can, under the same threat models, and with ``radius``
    each input's largest certified radius up to eps. ``probe`` takes a short look at each model that is attacked, for
    what it says of attacks on it: see :mod:`robustbench_lite.audit`.

    Raises:
        ValueError: for anything that cannot be run as asked; in one line.
    """
    images, workshop, wanted = prepare(
        attacks,
        defenses,
        dataset,
        threats,
        n=n,
        model=model,
        weights=weights,
        inputs=inputs,
        adaptive=adaptive,
        device=device,
        data_dir=data_dir,
        certifiers=certifiers,
        watcher=watcher,
    )
    store = Store(Path(out), watcher.note)
    store.prepare()
    source = cache(workshop.source)
    wanted = wanted.with_sources(source, watcher.note)
    watcher.planned(len(wanted) * len(images))
    training = workshop.training if wanted.learns else None
    runner = Runner(images, training, source, store, seed, target, batch or BATCH, fresh, keep_all, watcher)
    entries, proofs, probes = [], [], []
    for chain, assaults in wanted.assaults.items():
        subject = workshop.subject(chain)
        with frozen(subject.model):
            entries += [runner.attack(subject, *assault) for assault in assaults]
            proofs += [runner.certify(subject, certifier, threat, radius) for certifier, threat in wanted.proving]
            ways = dict.fromkeys((assault.threat, assault.adaptive) for assault in assaults if probe)
            probes += [runner.probe(subject, *way) for way in ways]
    return _in_order(entries, proofs, probes)


def prepare(
    attacks: str | Sequence[str | Attack],
    defenses: str | Sequence[str] | None,
    dataset: str,
    threats: Sequence[str | ThreatModel] | None,
    *,
    n: int | None,
    model: str | nn.Module | None = None,
    weights: str | Path | None = None,
    inputs: Inputs = AS_IS,
    adaptive: str = "on",
    device: str = "auto",
    data_dir: str | Path | None = None,
    certifiers: str | Sequence[str | Certifier] = (),
    watcher: Watcher = SILENT,
) -> tuple[data.Images, Workshop, Plan]:
    """The images, the workshop and the plan of what :func:`benchmark` is asked; nothing is trained, run or written.

    Raises:
        ValueError: as :func:`benchmark` does.
    """
    images = data.load(dataset, "test", _path(data_dir))
    count = len(images) if n is None else n
    if not 1 <= count <= len(images):
        raise ValueError(f"n must be 1 to {len(images)} (the test images of {dataset}), not {count}")
    workshop = Workshop(
        dataset,
        images.shape,
        images.classes,
        data_dir=_path(data_dir),
        model=model,
        weights=_path(weights),
        inputs=inputs,
        device=find_device(device),
        note=watcher.note,
        progress=watcher.training,
    )
    wanted = plan(workshop, images, attacks, defenses, certifiers, threats, adaptive, watcher.note)
    return images.take(slice(count)), workshop, wanted


def load(out: str | Path, note: Callable[[str], None] = lambda text: None) -> Results:
    """The results of every run below a folder.

    Raises:
        ValueError: where there are none.
    """
    store = Store(Path(out), note)
    stored = [(cell, cell.kind.join(cast(Any, chunks))) for cell, chunks in store.cells() if chunks]
    if not stored:
        raise ValueError(f"there are no results in {out}")
    outcomes = [(cell, found) for cell, found in stored if isinstance(found, Outcome)]
    proofs = [_proof(cell, found) for cell, found in stored if isinstance(found, Certified)]
    probes = [_probe(cell, found) for cell, found in stored if isinstance(found, Probed)]
    asked = {(*_place(cell), cell.identity["eps"]) for cell, _ in outcomes}
    entries = []
    for cell, outcome in outcomes:
        own, elsewhere = cell.identity["eps"], {eps for *place, eps in asked if (*place,) == _place(cell)} - {None}
        for eps in elsewhere | store.asked(cell) if own is None else [own]:
            entries.append(_entry(cell, ThreatModel(NORMS[cell.identity["norm"]], eps), outcome))
    return _in_order(entries, proofs, probes)


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first there is of cuda, mps and cpu.

    Raises:
        ValueError: for one that is not there.
    """
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here; there are: {', '.join(there)}") from error
    return device


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table in one step; numbers are numbers, an empty field is none.

    Raises:
        ValueError: where the file cannot be written.
    """
    with _replacing(path) as part:
        frame.to_csv(part, index=False, lineterminator="\n")


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
        cell = self.cell(subject, attack, threat, adaptive=adaptive)
        if getattr(attack, "minimises", False):
            self.store.ask(cell, threat.eps)
        learned = self.store.learned(cell) if learns(attack) and not self.fresh else None
        done, missing = self.stored(Outcome, cell, anew=self.fresh or (learns(attack) and learned is None))
        self._advance(subject, attack, threat, sum(map(len, done)))
        if missing:
            bench = self.bench(subject, attack, threat, adaptive)
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
        entry = _entry(cell, threat, Outcome.join(done))
        return entry if learned is None else replace(entry, learned=learned.float().numpy())

    def bench(self, subject: Subject, attack: Attack, threat: ThreatModel, adaptive: bool) -> Bench:
        """Where the attack is run."""
        classes, x, y = self._check(subject.model, threat), self.images.x, self.images.y
        sources = checked(lambda spec: self.source(spec, attack.name).model, classes, x, y, threat)
        bench = Bench(
            subject.model, threat, classes, self.seed, self.target, self.batch, self.keep_all, adaptive, sources
        )
        self._check(bench.known, threat)
        return bench

    def certify(self, subject: Subject, certifier: Certifier, threat: ThreatModel, radius: bool) -> leaderboard.Proof:
        """A chunk at a time, since that is what an error of the certifier may cost."""
        cell = self.cell(subject, certifier, threat, searches(certifier, radius))
        done, missing = self.stored(Certified, cell, self.fresh)
        self._advance(subject, certifier, threat, sum(map(len, done)))
        if missing:
            self._check(subject.model, threat)
            court = Court(subject.model, certifier, threat, self.seed, radius)
            for span in missing:
                rows = torch.arange(*span)
                done.append(court.hear(self.images.x[rows], self.images.y[rows], rows))
                self.store.save(cell, done[-1])
                self._advance(subject, certifier, threat, len(rows))
        proof = _proof(cell, Certified.join(done))
        for reason in dict.fromkeys(proof.certified.reason[proof.certified.status == UNSUPPORTED].tolist()):
            self.watcher.note(f"certifier {proof.certifier} does not cover {subject.defense}: {reason}")
        return proof

    def probe(self, subject: Subject, threat: ThreatModel, adaptive: bool) -> leaderboard.Probe:
        """Of the first chunk."""
        cell = self._probing(subject, threat, adaptive)
        stop = min(CHUNK, len(self.images))
        found = None if self.fresh else self.store.load(cell, 0, stop)
        if not isinstance(found, Probed):
            classes = self._check(subject.model, threat)
            bench = Bench(subject.model, threat, classes, self.seed, batch=self.batch, adaptive=adaptive)
            self._check(bench.known, threat)
            found = probing.probe(bench, self.images.x[:stop], self.images.y[:stop], torch.arange(stop))
            self.store.save(cell, found)
        return _probe(cell, found)

    def stored(self, kind: type[Found], cell: Cell, anew: bool) -> tuple[list[Found], list[tuple[int, int]]]:
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

    def cell(
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
            **self._identity(subject, threat, adaptive),
            kind: {**registry.identity(plugin), "origin": registry.origin(type(plugin))},
            "eps": None if getattr(plugin, "minimises", False) else threat.eps,
            **({"target": self.target} if search is None else {"search": search}),
        }
        if search is None and learns(cast(Attack, plugin)):
            identity["training"] = cast(data.Images, self.training).fingerprint
        if search is None and crafted(cast(Attack, plugin)):
            identity["source"] = self.source(cast(Crafted, plugin).source, plugin.name).identity
        return Cell(identity, {**self._about(subject, threat), kind: registry.spec(plugin)})

    def _probing(self, subject: Subject, threat: ThreatModel, adaptive: bool) -> Cell:
        """A probe's cell."""
        identity = {**self._identity(subject, threat, adaptive), "probe": probing.VERSION}
        return Cell(identity, {**self._about(subject, threat), "classes": self.images.classes})

    def _identity(self, subject: Subject, threat: ThreatModel, adaptive: bool) -> dict[str, Any]:
        return {
            "data": self.images.fingerprint,
            "model": subject.identity,
            "norm": threat.norm.name,
            "eps": threat.eps,
            "range": [threat.lower, threat.upper],
            "seed": self.seed,
            "precision": "float32",
            **({} if adaptive else {"adaptive": False}),
        }

    def _about(self, subject: Subject, threat: ThreatModel) -> dict[str, Any]:
        return {
            "dataset": self.images.name,
            "defense": subject.defense,
            "model": subject.architecture,
            "parameters": subject.parameters,
            "threshold": subject.model.threshold,
            "eps": threat.eps,
            "version": __version__,
            "torch": torch.__version__,
            "shape": list(self.images.shape),
        }


def _entry(cell: Cell, threat: ThreatModel, outcome: Outcome) -> leaderboard.Entry:
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


def _proof(cell: Cell, certified: Certified) -> leaderboard.Proof:
    setting = _setting(cell, cell.identity["eps"])
    return leaderboard.Proof(**setting, certifier=cell.about["certifier"], certified=certified)


def _probe(cell: Cell, probed: Probed) -> leaderboard.Probe:
    setting = _setting(cell, cell.identity["eps"])
    adaptive = cell.identity.get("adaptive", True)
    return leaderboard.Probe(**setting, adaptive=adaptive, probed=probed, classes=cell.about["classes"])


def _setting(cell: Cell, eps: float) -> dict[str, Any]:
    return {
        **{name: cell.about[name] for name in ("dataset", "defense", "model", "parameters")},
        **{name: cell.identity[name] for name in ("norm", "seed")},
        "eps": eps,
        "subject": " ".join(_place(cell)[:2]),
    }


def _place(cell: Cell) -> tuple[str, str, str, int]:
    """Data, model, norm and seed of a cell: where an eps that was asked about one attack counts for all."""
    model = json.dumps(cell.identity["model"], sort_keys=True)
    return cell.identity["data"], model, cell.identity["norm"], cell.identity["seed"]


def _in_order(
    entries: Iterable[leaderboard.Entry],
    proofs: Iterable[leaderboard.Proof],
    probes: Iterable[leaderboard.Probe],
) -> Results:
    """Results whose order does not depend on how they were asked for, or stored."""

    def key(one: leaderboard.Setting) -> tuple[Any, ...]:
        dataset, norm, *block = one.block
        about = one.defense, one.model, one.subject, not one.adaptive, one.plugin
        return dataset, list(NORMS).index(norm), *block, *about

    return Results(tuple(sorted(entries, key=key)), tuple(sorted(proofs, key=key)), tuple(probes))


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it is written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
