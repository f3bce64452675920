"""Every attack against every defense: planned, run chunk by chunk, stored, and read back as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import nn

from robustbench_lite import audit, comparison, curves, data, exports, figures, leaderboard, report
from robustbench_lite.claims import Claims
from robustbench_lite.cluster import Cluster
from robustbench_lite.defended import Precision, computing
from robustbench_lite.entries import Entry, Found, Probe, Proof, Setting, violations
from robustbench_lite.evaluation import BATCH, Target
from robustbench_lite.files import replacing
from robustbench_lite.layout import Layout
from robustbench_lite.norms import NORMS
from robustbench_lite.outcome import ERROR, UNKNOWN, Certified, Outcome, Probed
from robustbench_lite.planning import Plan, plan
from robustbench_lite.plugins import Attack, Certifier
from robustbench_lite.pool import Pool
from robustbench_lite.runner import ROOMY, SILENT, Runner, Watcher, entry_of, place_of, probe_of, proof_of
from robustbench_lite.store import Store
from robustbench_lite.tasks import Answer, Executor, Here, Station, Task
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import AS_IS, Inputs, Workshop

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Results:
    """What a benchmark found, as tables; every figure is derived from :meth:`rows` and :meth:`certified_rows`."""

    entries: tuple[Entry, ...]
    proofs: tuple[Proof, ...] = ()
    probes: tuple[Probe, ...] = ()

    def leaderboard(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.leaderboard`."""
        return leaderboard.leaderboard(self.entries, self.proofs, audit.flags(self.findings))

    def matrix(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.matrix`."""
        return leaderboard.matrix(self.entries, self.proofs)

    def per_class(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.leaderboard.per_class`."""
        return leaderboard.per_class(self.entries, self.proofs)

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
        """See :func:`robustbench_lite.entries.violations`."""
        return violations(self.entries, self.proofs)

    def curves(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.curves.curves`."""
        return curves.curves(self.entries)

    def trainings(self) -> pd.DataFrame:
        """See :func:`robustbench_lite.figures.trainings`."""
        return figures.trainings([*self.entries, *self.proofs])

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

    def compare(self, later: Results) -> pd.DataFrame:
        """What changed; see :func:`robustbench_lite.comparison.compare`."""
        return comparison.compare(self, later)

    def to_csv(self, path: str | Path) -> None:
        """Writes the leaderboard."""
        write_csv(self.leaderboard(), Path(path))

    def to_html(self, path: str | Path, data_dir: str | Path | None = None) -> None:
        """Writes all there is to see as one page; see :mod:`robustbench_lite.report`. Clean images for its gallery are
        looked for in ``data_dir``, as for a run.

        Raises:
            ValueError: where the file cannot be written.
        """
        write_html([report.Part(self, self.leaderboard())], Path(path), _path(data_dir))

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

    def plot_curves(self, path: str | Path) -> None:
        """Draws :meth:`curves`, as SVG, PDF or PNG.

        Raises:
            ValueError: for a file of another kind, or one that cannot be written.
        """
        kind = curves.format_of(path)
        with replacing(Path(path)) as part:
            curves.plot(self.curves(), part, kind)

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
        with replacing(Path(path)) as part:
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
        with replacing(Path(path)) as part, part.open("wb") as file:
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
    workers: int = 0,
    threads: int = 1,
    timeout: float | None = None,
    isolate: bool = False,
    ray: str | None = None,
    eot: int | None = None,
    precision: Precision = "float32",
    layout: Layout = "as-built",
    watcher: Watcher = SILENT,
) -> Results:
    """Runs every attack against every defense and stores the results, so that a second call only reads them.

    ``attacks`` and ``defenses`` are specs such as ``"pgd:steps=100"`` (attacks may be plugin objects; ``"all"`` means
    every built-in one; by default ``madry``, or the user's own model, is defended), ``threats`` such as
    ``"linf:8/255"``; by default each attack runs under linf, or else its own first norm, at the data set's customary
    eps. The first ``n`` test images are attacked (None: all). ``keep_all`` keeps every adversarial image.
    ``adaptive`` says whether attacks know a defense's last wrapper, are blind to it (``off``), or are run both ways.
    ``eot`` is over how many draws of a stochastic defense gradients are averaged (None: as it has it). ``precision`` is
    what attacks' queries are computed in, ``"float32"`` or ``"bf16"``, and ``layout``, ``"as-built"`` or
    ``"channels-last"``, how the model lies in memory for them; what counts is computed in float32, by the model as it
    is.
    ``certifiers``, specs or objects too, then prove what they can, under the same threat models, and with ``radius``
    each input's largest certified radius up to eps. ``probe`` takes a short look at each model that is attacked, for
    what it says of attacks on it: see :mod:`robustbench_lite.audit`.

    ``workers`` processes share the work, chunk by chunk; 0 computes it in this one. Each process computes with as many
    ``threads``, whose number may change last bits, while that of workers changes nothing. A chunk may take ``timeout``
    seconds, or else ends unknown and is tried again in the next run; ``isolate`` gives each cell a process of its own.
    Either means at least one worker. With ``ray``, the address of a Ray cluster (``"local"``: one on this machine),
    workers are its actors, as many as there is room for unless ``workers`` says how many.

    Raises:
        ValueError: for anything that cannot be run as asked; in one line.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, not {workers}")
    if timeout is not None and not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be above 0 seconds, not {timeout:g}")
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
    processes = max(workers, int(isolate or timeout is not None))
    if (processes or ray) and workshop.terms is not None and workshop.terms.limited:
        raise ValueError("rate and queries are kept by one process: leave out workers, ray, timeout and isolate")
    store = Store(Path(out), watcher.note)
    store.prepare()
    batch = batch or (BATCH if workshop.device.type == "cpu" else ROOMY)
    station = Station(workshop, images, seed, target, batch, keep_all, radius, threads, eot, precision, layout)
    with computing(threads), Claims() as claims, _executor(station, processes, workers, ray) as executor:
        wanted = wanted.with_sources(station.source, watcher.note)
        watcher.planned(len(wanted) * len(images))
        share = max(1, executor.size)
        runner = Runner(station, store, claims, executor, watcher, share, timeout, isolate, fresh, probing=probe)
        return _in_order(runner.run(wanted), store)


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


@contextmanager
def _executor(station: Station, processes: int, workers: int, ray: str | None) -> Iterator[Executor]:
    """Who computes: this process, or as many others, or so many ``workers`` of a cluster (0: all it has room for)."""
    if ray is not None:
        gpu = station.workshop.device.type == "cuda"
        with Cluster[Task, Answer](station.packed(), ray, workers, station.threads, gpu) as cluster:
            yield cluster
    elif processes:
        with Pool[Task, Answer](station.packed(), processes) as pool:
            yield pool
    else:
        yield Here(station)


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
    proofs = [proof_of(cell, found) for cell, found in stored if isinstance(found, Certified)]
    probes = [probe_of(cell, found) for cell, found in stored if isinstance(found, Probed)]
    asked = {(*place_of(cell), cell.identity["eps"]) for cell, _ in outcomes}
    entries = []
    for cell, outcome in outcomes:
        own, elsewhere = cell.identity["eps"], {eps for *place, eps in asked if (*place,) == place_of(cell)} - {None}
        for eps in elsewhere | store.asked(cell) if own is None else [own]:
            entry = entry_of(cell, ThreatModel(NORMS[cell.identity["norm"]], eps), outcome)
            learned = store.learned(cell)
            entries.append(entry if learned is None else replace(entry, learned=learned.float().numpy()))
    return _in_order([*entries, *proofs, *probes], store)


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
    with replacing(path) as part:
        frame.to_csv(part, index=False, lineterminator="\n")


def write_table(board: pd.DataFrame, path: Path) -> None:
    """Writes a leaderboard in the format that the file's name asks for, one of ``exports.FORMATS``.

    Raises:
        ValueError: where the file cannot be written.
    """
    with replacing(path) as part:
        part.write_text(exports.text(board, path), "utf-8", newline="\n")


def write_html(parts: Sequence[report.Part], path: Path, data_dir: Path | None) -> None:
    """Writes a page of results, those that are ranked by themselves a part each.

    Raises:
        ValueError: where the file cannot be written.
    """
    with replacing(path) as part:
        part.write_text(report.html(parts, data_dir), "utf-8", newline="\n")


def _in_order(found: Sequence[Found], store: Store) -> Results:
    """Results whose order does not depend on how they were asked for, or stored; with what the store knows of how
    their models were trained."""

    def key(one: Setting) -> tuple[Any, ...]:
        dataset, norm, *block = one.block
        return dataset, list(NORMS).index(norm), *block, one.defense, one.model, one.subject, not one.adaptive

    found = [one if one.cell is None else replace(one, history=store.history(one.cell)) for one in found]
    entries = [one for one in found if isinstance(one, Entry)]
    proofs = [one for one in found if isinstance(one, Proof)]
    probes = [one for one in found if isinstance(one, Probe)]
    return Results(
        tuple(sorted(entries, key=lambda one: (*key(one), one.attack))),
        tuple(sorted(proofs, key=lambda one: (*key(one), one.certifier))),
        tuple(sorted(probes, key=key)),
    )


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
