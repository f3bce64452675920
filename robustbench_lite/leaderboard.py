"""Tables from raw rows: pure functions, so that every figure can be worked out anew from what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_lite import __version__
from robustbench_lite.outcome import HELD, SKIPPED, UNKNOWN, WRONG, Outcome

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

LEADERBOARD = (
    "rank",
    "dataset",
    "defense",
    "model",
    "parameters",
    "norm",
    "eps",
    "examples",
    "clean_accuracy",
    "robust_accuracy",
    "robust_low",
    "robust_high",
    "worst_attack",
    "attacks",
    "unknown",
    "forwards",
    "backwards",
    "seconds",
    "seed",
    "version",
)


@dataclass(frozen=True)
class Entry:
    """The outcome of one attack against one defended model under one threat model, and what they were."""

    dataset: str
    defense: str
    model: str
    parameters: int
    norm: str
    eps: float
    attack: str
    seed: int
    outcome: Outcome
    subject: str = ""  # tells apart models, and data, that go by one name
    learned: NDArray[np.float32] | None = None  # by the attack from training data: a patch (C, h, w)

    @property
    def block(self) -> tuple[str, str, float, int]:
        """What is compared with each other."""
        return self.dataset, self.norm, self.eps, self.seed

    @property
    def row(self) -> tuple[Any, ...]:
        """What one leaderboard row is about."""
        return *self.block, self.defense, self.model, self.parameters, self.subject


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


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


def _groups(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The entries of each leaderboard row, cut to the inputs that all of them have."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.row, []).append(entry)
    cut = []
    for group in groups.values():
        common = reduce(np.intersect1d, [entry.outcome.row for entry in group])
        if len(common):
            cut.append([replace(entry, outcome=entry.outcome.select(common)) for entry in group])
    return cut


def leaderboard(entries: Iterable[Entry]) -> pd.DataFrame:
    """A row a (data set, threat model, defense), best first; the columns are those of ``LEADERBOARD``.

    Accuracies are fractions of the examples; ``robust_low`` and ``robust_high`` are their 95 % Wilson interval;
    ``forwards`` and ``backwards`` are means an input, over all attacks together; ``unknown`` counts inputs.
    """
    import pandas as pd

    table = []
    for group in _groups(entries):
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
                "examples": count,
                "clean_accuracy": float((outcomes[0].status != WRONG).mean()),
                "robust_accuracy": float(held.mean()),
                "robust_low": low,
                "robust_high": high,
                "worst_attack": worst.attack,
                "attacks": "; ".join(entry.attack for entry in group),
                "unknown": int(unknown(outcomes).sum()),
                "forwards": float(np.sum([outcome.forwards for outcome in outcomes], axis=0).mean()),
                "backwards": float(np.sum([outcome.backwards for outcome in outcomes], axis=0).mean()),
                "seconds": round(float(sum(outcome.seconds.sum() for outcome in outcomes)), 3),
                "seed": first.seed,
                "version": __version__,
            }
        )
    board = pd.DataFrame(table, columns=list(LEADERBOARD))
    keys = ["dataset", "norm", "eps", "seed"]
    board["rank"] = board.groupby(keys, sort=False)["robust_accuracy"].rank("min", ascending=False).astype(int)
    block = board.groupby(keys, sort=False).ngroup()
    order = board.assign(block=block).sort_values(["block", "rank"], kind="stable").index
    return board.loc[order].reset_index(drop=True)


def matrix(entries: Iterable[Entry]) -> pd.DataFrame:
    """Robust accuracy, a row a (data set, threat model, defense) and a column an attack; empty where it did not run."""
    import pandas as pd

    table = []
    for group in _groups(entries):
        about = {name: getattr(group[0], name) for name in ("dataset", "norm", "eps", "defense")}
        table.append(about | {entry.attack: float(robust([entry.outcome]).mean()) for entry in group})
    return pd.DataFrame(table)


def rows(entries: Iterable[Entry]) -> pd.DataFrame:
    """A line an input and attack."""
    import pandas as pd

    frames = []
    for entry in entries:
        frame = entry.outcome.to_frame()
        about = {name: getattr(entry, name) for name in ("dataset", "defense", "norm", "eps", "attack", "seed")}
        for place, (name, value) in enumerate(about.items()):
            frame.insert(place, name, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
