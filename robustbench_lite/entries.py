"""What attacks and certifiers found, cell by cell, and what follows for the inputs of a leaderboard row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from robustbench_lite.outcome import (
    BROKEN,
    FALSIFIED,
    HELD,
    REJECTED,
    SKIPPED,
    UNKNOWN,
    UNSUPPORTED,
    VERIFIED,
    WRONG,
    Certified,
    Outcome,
    Probed,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from robustbench_lite.history import History
    from robustbench_lite.store import Cell


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A defended model under one threat model, for one attack or certifier."""

    dataset: str
    defense: str
    model: str
    parameters: int
    norm: str
    eps: float
    seed: int
    adaptive: bool = True  # or the attack was blind to the last wrapper
    subject: str = ""  # tells apart models, and data, that go by one name
    cell: Cell | None = None  # where it is stored
    history: History = ()  # of the training of the model

    kind: ClassVar[str]

    @property
    def plugin(self) -> str:
        """The spec of the attack or certifier."""
        return str(getattr(self, self.kind))

    @property
    def block(self) -> tuple[str, str, float, int]:
        """What is compared with each other."""
        return self.dataset, self.norm, self.eps, self.seed

    @property
    def row(self) -> tuple[Any, ...]:
        """What one leaderboard row is about."""
        return *self.block, self.defense, self.model, self.parameters, self.subject

    @property
    def line(self) -> tuple[Any, ...]:
        """Which leaderboard row it belongs to, those of blind attacks set apart."""
        return *self.row, self.adaptive

    @property
    def place(self) -> tuple[Any, ...]:
        """Where a certificate holds for every attack, whatever the eps and the seed of each."""
        return self.dataset, self.norm, self.defense, self.model, self.parameters, self.subject


@dataclass(frozen=True, kw_only=True)
class Entry(Setting):
    """The outcome of an attack."""

    attack: str
    outcome: Outcome
    threshold: float | None = None  # of a detector
    draws: int | None = None  # of a stochastic defense
    learned: NDArray[np.float32] | None = None  # by the attack from training data: a patch (C, h, w)

    kind = "attack"


@dataclass(frozen=True, kw_only=True)
class Proof(Setting):
    """What a certifier proved."""

    certifier: str
    certified: Certified

    kind = "certifier"


@dataclass(frozen=True, kw_only=True)
class Probe(Setting):
    """What a probe of the model showed."""

    probed: Probed
    classes: int


Found = Entry | Proof | Probe


def robust(outcomes: Sequence[Outcome]) -> NDArray[np.bool_]:
    """Which inputs were held by all attacks, over the same rows: right when clean, never fooled, never of unknown
    status, and attacked at least once."""
    held = np.array([(o.status == HELD) & ~o.fooled for o in outcomes])
    spared = np.array([o.status == SKIPPED for o in outcomes])
    every: NDArray[np.bool_] = np.all(held | spared, axis=0)
    return every & held.any(0)


def unknown(outcomes: Sequence[Outcome]) -> NDArray[np.bool_]:
    """Which inputs are of unknown status: no attack is known to fool the model, and one ended unknown."""
    fooled = np.array([o.fooled for o in outcomes]).any(0)
    return np.logical_and(np.array([o.status == UNKNOWN for o in outcomes]).any(0), ~fooled)


def detection(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What a detector did: the ``detection_rate``, of the correctly classified inputs that it rejected under attack or
    that were broken; ``false_positives``, the share of clean inputs that it rejected."""
    broken = np.array([o.fooled for o in outcomes]).any(0)
    rejected = np.array([o.adversarial == REJECTED for o in outcomes]).any(0) & ~broken
    count = int(rejected.sum() + broken.sum())
    return {
        "detection_rate": float(rejected.sum() / count) if count else np.nan,
        "false_positives": float((outcomes[0].clean == REJECTED).mean()),
    }


def by_draw(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of a stochastic defense the robust accuracy of a single draw: ``draw_mean``, and the deviation ``draw_std``.

    An input survives a draw as often as under the attack that does best; draws of different inputs are independent, so
    that variances add up.
    """
    right = np.array([np.where(o.status == UNKNOWN, 0, o.share) for o in outcomes])
    share = np.fmin.reduce(right, initial=1)
    return {"draw_mean": float(share.mean()), "draw_std": math.sqrt((share * (1 - share)).sum()) / len(share)}


def grouped(entries: Iterable[Entry], proofs: Iterable[Proof] = ()) -> list[list[Entry]]:
    """The entries of each leaderboard row, cut to the inputs that all of them have; a certifier that found
    counterexamples among these is one more attack."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.line, []).append(entry)
    cut = []
    for group in groups.values():
        common = reduce(np.intersect1d, [entry.outcome.row for entry in group])
        if len(common):
            cut.append([replace(entry, outcome=entry.outcome.select(common)) for entry in group])
            cut[-1] += [_falsifier(proof, common) for proof in proofs if _falsifies(proof, group[0], common)]
    return cut


def _falsifies(proof: Proof, entry: Entry, rows: NDArray[np.int64]) -> bool:
    """Whether a proof, asked about all of ``rows`` in the entry's leaderboard row, has a counterexample to one."""
    same = entry.adaptive and proof.row == entry.row and np.isin(rows, proof.certified.row).all()
    return bool(same and (proof.certified.select(rows).status == FALSIFIED).any())


def _falsifier(proof: Proof, rows: NDArray[np.int64]) -> Entry:
    """A certifier as an attack: what it verified or could not decide is held."""
    found = proof.certified.select(rows)
    says = {FALSIFIED: BROKEN, WRONG: WRONG}
    nothing = np.zeros(len(found), np.int64)
    return Entry(
        **{field.name: getattr(proof, field.name) for field in fields(Setting)},
        attack=f"{proof.certifier} (counterexamples)",
        outcome=Outcome(
            row=found.row,
            label=found.label,
            clean=found.clean,
            adversarial=np.full(len(found), -1),
            status=np.array([says.get(status, HELD) for status in found.status.tolist()]),
            reason=np.full(len(found), ""),
            distance=np.full(len(found), np.nan),
            share=np.full(len(found), np.nan),
            forwards=nothing,
            backwards=nothing,
            seconds=np.zeros(len(found)),
            imaged=found.imaged,
            images=found.images,
        ),
    )


def certified_by(row: tuple[Any, ...], rows: NDArray[np.int64], proofs: Iterable[Proof]) -> list[Proof]:
    """The proofs that say something of a leaderboard row, cut to its inputs: their certifier was asked about all of
    them and covers the model."""
    asked = [
        replace(proof, certified=proof.certified.select(rows))
        for proof in proofs
        if proof.row == row and np.isin(rows, proof.certified.row).all()
    ]
    return [proof for proof in asked if not {*proof.certified.status.tolist()} <= {WRONG, UNSUPPORTED}]


def verified(proofs: Sequence[Proof]) -> NDArray[np.bool_]:
    """Which inputs any certifier verified, over the same rows."""
    any_of: NDArray[np.bool_] = np.any([proof.certified.status == VERIFIED for proof in proofs], axis=0)
    return any_of


def violations(entries: Iterable[Entry], proofs: Sequence[Proof]) -> list[str]:
    """A line for each input for which an adversarial was found inside a ball that is certified: a bug, in the attack,
    the certificate or the model. Blind attacks are not held against certificates."""
    everything: list[Entry | Proof] = [*entries, *proofs]
    return [
        f"input {row} of {proof.dataset}, {proof.defense}: {proof.certifier} certifies {proof.norm}:{radius:g} "
        f"(seed {proof.seed}), but {found.plugin} (seed {found.seed}) found an adversarial at {size:g}"
        for proof in proofs
        for found in everything
        if found.place == proof.place and found.adaptive
        for row, size, radius in _inside(found, proof.certified)
    ]


def _inside(found: Entry | Proof, certified: Certified) -> list[tuple[int, float, float]]:
    """Row, size and certified radius of what was found inside."""
    if isinstance(found, Entry):
        there = found.outcome.status == BROKEN
        row = found.outcome.row[there]
        size = np.minimum(found.outcome.distance[there], found.eps)  # in eps's unit; a patch's distance is a side
    else:
        row, size = found.certified.imaged, np.full(len(found.certified.imaged), found.eps)
    _, one, other = np.intersect1d(row, certified.row, return_indices=True)
    radius = certified.radius[other]
    inside = size[one] <= radius
    return list(zip(row[one][inside].tolist(), size[one][inside].tolist(), radius[inside].tolist()))
