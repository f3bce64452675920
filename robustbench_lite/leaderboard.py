"""Tables from raw rows: pure functions, so that every figure can be worked out anew from what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from robustbench_lite import __version__
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
    import pandas as pd
    from numpy.typing import NDArray

    from robustbench_lite.store import Cell

LEADERBOARD = (
    "rank",
    "dataset",
    "defense",
    "model",
    "parameters",
    "norm",
    "eps",
    "adaptive",
    "examples",
    "clean_accuracy",
    "certified_accuracy",
    "certified_low",
    "certified_high",
    "robust_accuracy",
    "robust_low",
    "robust_high",
    "draws",
    "draw_mean",
    "draw_std",
    "p_above",
    "worst_attack",
    "attacks",
    "certifiers",
    "detection_rate",
    "false_positives",
    "threshold",
    "unknown",
    "flags",
    "forwards",
    "backwards",
    "seconds",
    "seed",
    "version",
)


CERTIFICATES = (
    "dataset",
    "defense",
    "model",
    "parameters",
    "norm",
    "eps",
    "certifier",
    "examples",
    "clean_accuracy",
    "certified_accuracy",
    "certified_low",
    "certified_high",
    "mean_margin",
    "mean_radius",
    "verified",
    "falsified",
    "unknown",
    "unsupported",
    "seconds",
    "seed",
    "version",
)


PER_CLASS = (
    "dataset",
    "defense",
    "model",
    "norm",
    "eps",
    "adaptive",
    "class",
    "examples",
    "clean_accuracy",
    "robust_accuracy",
    "robust_low",
    "robust_high",
    "seed",
    "version",
)


_NO_DETECTOR = {"detection_rate": np.nan, "false_positives": np.nan}
_ONE_ANSWER = {"draw_mean": np.nan, "draw_std": np.nan}


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


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson, 1927, equation 12)."""
    from scipy.special import ndtri  # scipy.stats has it too, and takes seconds to import

    z, p = float(ndtri(0.975)), successes / trials
    centre, half = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    return low if successes else 0.0, high if successes < trials else 1.0


def mcnemar(
    one: NDArray[np.bool_],
    other: NDArray[np.bool_],
    alternative: Literal["two-sided", "less", "greater"] = "two-sided",
) -> float:
    """The p-value of the same inputs being true equally often in ``one`` and ``other``, by the exact test of those on
    which they differ (McNemar, 1947); ``greater``: against ``one`` being true more often."""
    from scipy.special import bdtr  # scipy.stats has the test, and takes seconds to import

    alone, both = int((one & ~other).sum()), int((one != other).sum())
    fewer, more = float(bdtr(alone, both, 0.5)), float(bdtr(both - alone, both, 0.5))
    return {"less": fewer, "greater": more, "two-sided": min(1.0, 2 * min(fewer, more))}[alternative]


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
        attack=proof.certifier,
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


def _bound(row: tuple[Any, ...], rows: NDArray[np.int64], proofs: Iterable[Proof]) -> dict[str, Any]:
    """The certified columns of a leaderboard row."""
    asked = certified_by(row, rows, proofs)
    accuracy = low = high = np.nan
    if asked:
        proved = verified(asked)
        accuracy, (low, high) = float(proved.mean()), wilson(int(proved.sum()), len(rows))
    return {
        "certified_accuracy": accuracy,
        "certified_low": low,
        "certified_high": high,
        "certifiers": "; ".join(proof.certifier for proof in asked),
    }


def leaderboard(
    entries: Iterable[Entry], proofs: Sequence[Proof] = (), flags: Mapping[tuple[Any, ...], str] = {}
) -> pd.DataFrame:
    """A row a (data set, threat model, defense), best first; the columns are those of ``LEADERBOARD``.

    Accuracies are fractions of the examples; ``_low`` and ``_high`` are their 95 % Wilson interval;
    ``forwards`` and ``backwards`` are means an input, over all attacks together; ``unknown`` counts inputs. A row of
    attacks that are blind to the defense is not ``adaptive``, and has no rank. A counterexample of a certifier that was
    asked about the same inputs breaks its input as an attack does. ``flags`` are those of a row, by its ``line``.
    ``p_above`` is the two-sided p-value, by :func:`mcnemar`, of the robust accuracy being that of the row ranked just
    above; there is none where the two are about different inputs.
    """
    import pandas as pd

    table, groups = [], grouped(entries, proofs)
    for group in groups:
        first, outcomes = group[0], [entry.outcome for entry in group]
        count, held = len(outcomes[0]), robust(outcomes)
        low, high = wilson(int(held.sum()), count)
        worst = min(group, key=lambda entry: robust([entry.outcome]).sum())
        table.append(
            {
                "rank": 0,
                "dataset": first.dataset,
                "defense": first.defense,
                "model": first.model,
                "parameters": first.parameters,
                "norm": first.norm,
                "eps": first.eps,
                "adaptive": first.adaptive,
                "examples": count,
                "clean_accuracy": float(outcomes[0].right.mean()),
                **_bound(first.row, outcomes[0].row, proofs),
                "robust_accuracy": float(held.mean()),
                "robust_low": low,
                "robust_high": high,
                "draws": first.draws,
                **(_ONE_ANSWER if first.draws is None else by_draw(outcomes)),
                "p_above": np.nan,
                "worst_attack": worst.attack,
                "attacks": "; ".join(entry.attack for entry in group),
                **(_NO_DETECTOR if first.threshold is None else detection(outcomes)),
                "threshold": np.nan if first.threshold is None else first.threshold,
                "unknown": int(unknown(outcomes).sum()),
                "flags": flags.get(first.line, ""),
                "forwards": float(np.sum([outcome.forwards for outcome in outcomes], axis=0).mean()),
                "backwards": float(np.sum([outcome.backwards for outcome in outcomes], axis=0).mean()),
                "seconds": round(float(sum(outcome.seconds.sum() for outcome in outcomes)), 3),
                "seed": first.seed,
                "version": __version__,
            }
        )
    board = pd.DataFrame(table, columns=list(LEADERBOARD))
    keys = ["dataset", "norm", "eps", "seed"]
    ranked = board[board["adaptive"].astype(bool)].groupby(keys, sort=False)["robust_accuracy"]
    board["draws"] = board["draws"].astype("Int64")
    board["rank"] = ranked.rank("min", ascending=False).reindex(board.index).astype("Int64")
    block = board.groupby(keys, sort=False).ngroup()
    order = board.assign(block=block).sort_values(["block", "rank"], kind="stable").index
    for above, here in pairwise(order):
        if block[above] == block[here] and board["adaptive"][here]:
            board.loc[here, "p_above"] = _differs(groups[above], groups[here])
    return board.loc[order].reset_index(drop=True)


def _differs(one: Sequence[Entry], other: Sequence[Entry]) -> float:
    """The p-value of two leaderboard rows being equally robust; NaN where they are about different inputs."""
    first, second = one[0].outcome, other[0].outcome
    if not (np.array_equal(first.row, second.row) and np.array_equal(first.label, second.label)):
        return np.nan
    return mcnemar(robust([entry.outcome for entry in one]), robust([entry.outcome for entry in other]))


def per_class(entries: Iterable[Entry], proofs: Sequence[Proof] = ()) -> pd.DataFrame:
    """A line a leaderboard row and class, of the examples with that label; the columns are those of ``PER_CLASS``."""
    import pandas as pd

    table = []
    for group in grouped(entries, proofs):
        outcomes = [entry.outcome for entry in group]
        held, right, label = robust(outcomes), outcomes[0].right, outcomes[0].label
        for one in np.unique(label):
            here = label == one
            low, high = wilson(int(held[here].sum()), int(here.sum()))
            table.append(
                {
                    **{name: getattr(group[0], name) for name in PER_CLASS[:6]},
                    "class": int(one),
                    "examples": int(here.sum()),
                    "clean_accuracy": float(right[here].mean()),
                    "robust_accuracy": float(held[here].mean()),
                    "robust_low": low,
                    "robust_high": high,
                    "seed": group[0].seed,
                    "version": __version__,
                }
            )
    return pd.DataFrame(table, columns=list(PER_CLASS))


def matrix(entries: Iterable[Entry], proofs: Sequence[Proof] = ()) -> pd.DataFrame:
    """Robust accuracy, a row a (data set, threat model, defense) and a column an attack; empty where it did not run."""
    import pandas as pd

    table = []
    for group in grouped(entries, proofs):
        about = {name: getattr(group[0], name) for name in ("dataset", "norm", "eps", "defense", "adaptive")}
        table.append(about | {entry.attack: float(robust([entry.outcome]).mean()) for entry in group})
    return pd.DataFrame(table)


def rows(entries: Iterable[Entry] | Iterable[Proof]) -> pd.DataFrame:
    """A line an input and attack, or an input and certifier."""
    import pandas as pd

    frames = []
    for entry in entries:
        frame = (entry.outcome if isinstance(entry, Entry) else entry.certified).to_frame()
        names = ["dataset", "defense", "norm", "eps", entry.kind, "seed", *["adaptive"] * isinstance(entry, Entry)]
        about = {name: getattr(entry, name) for name in names}
        for place, (name, value) in enumerate(about.items()):
            frame.insert(place, name, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def certificates(proofs: Iterable[Proof]) -> pd.DataFrame:
    """A row a certificate; the columns are those of ``CERTIFICATES``.

    ``mean_margin`` is over the inputs that have a bound, ``mean_radius`` over all; statuses are counts.
    """
    import pandas as pd

    table = []
    for proof in proofs:
        found, count = proof.certified, len(proof.certified)
        counts = {status: int((found.status == status).sum()) for status in (VERIFIED, FALSIFIED, UNKNOWN, UNSUPPORTED)}
        low, high = wilson(counts[VERIFIED], count)
        bounded = found.margin[~np.isnan(found.margin)]
        table.append(
            {
                **{name: getattr(proof, name) for name in CERTIFICATES[:7]},
                "examples": count,
                "clean_accuracy": float(found.right.mean()),
                "certified_accuracy": counts[VERIFIED] / count,
                "certified_low": low,
                "certified_high": high,
                "mean_margin": float(bounded.mean()) if len(bounded) else np.nan,
                "mean_radius": float(found.radius.mean()),
                **counts,
                "seconds": round(float(found.seconds.sum()), 3),
                "seed": proof.seed,
                "version": __version__,
            }
        )
    return pd.DataFrame(table, columns=list(CERTIFICATES))


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
