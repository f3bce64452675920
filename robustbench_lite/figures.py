"""What figures show, as tables worked out from stored rows; the page and the plots draw the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robustbench_lite import curves
from robustbench_lite.chance import wilson
from robustbench_lite.entries import Entry, Proof, grouped, robust, unknown
from robustbench_lite.history import Epoch
from robustbench_lite.norms import NORMS
from robustbench_lite.outcome import BROKEN, SKIPPED, WRONG

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("dataset", "norm", "eps", "defense", "model", "adaptive", "seed")  # a leaderboard row, for those who read
BARS = 20  # of a histogram
POINTS = 20  # of a curve that one run gives whole
TRAININGS = ("dataset", "defense", "model", *Epoch._fields)


def cells(entries: Iterable[Entry], proofs: Sequence[Proof] = ()) -> pd.DataFrame:
    """A row an attack against a defense, with the 95 % Wilson interval of its robust accuracy. ``success`` is the share
    that it broke of the correctly classified inputs that it was run on; ``line`` numbers the leaderboard rows."""
    table = []
    for line, group in enumerate(grouped(entries, proofs)):
        for entry in group:
            held, tried = robust([entry.outcome]), _tried(entry)
            low, high = wilson(int(held.sum()), len(held))
            broken = int((entry.outcome.status == BROKEN).sum())
            table.append(
                {
                    **_about(line, entry),
                    "attack": entry.attack,
                    "examples": len(held),
                    "robust_accuracy": float(held.mean()),
                    "robust_low": low,
                    "robust_high": high,
                    "success": broken / tried if tried else np.nan,
                    "unknown": int(unknown([entry.outcome]).sum()),
                }
            )
    return _frame(table)


def bounds(board: pd.DataFrame) -> pd.DataFrame:
    """Of each leaderboard row what is proved, what survived every attack, and what is right when clean."""
    kinds = ("certified_accuracy", "certified_low", "certified_high", "robust_accuracy", "robust_low", "robust_high")
    return board[[*ABOUT, "examples", "clean_accuracy", *kinds]]


def security(entries: Iterable[Entry]) -> pd.DataFrame:
    """The security curves of :func:`robustbench_lite.curves.curves` that have more than one eps above 0; the one run
    of an attack that minimises distance gives its whole curve, at ``POINTS`` eps up to the largest that was asked."""
    entries = list(entries)
    frame = curves.curves([*entries, *_sweeps(entries)])
    keys = [*curves.CURVES[:7], "attack"]
    levels = frame.groupby(keys, sort=False, dropna=False)["eps"].transform("size")
    alone = frame.groupby(keys[:-1], sort=False, dropna=False)["attack"].transform("nunique") == 2
    return frame[(levels > 2) & ~(alone & (frame["attack"] == curves.ALL))].reset_index(drop=True)


def _sweeps(entries: Iterable[Entry]) -> Iterator[Entry]:
    """What attacks that minimise distance would have found at smaller eps."""
    widest: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        if entry.cell is not None and entry.cell.identity["eps"] is None:
            key = (*entry.place, entry.seed, entry.adaptive, entry.attack)
            widest[key] = max(entry, widest.get(key, entry), key=lambda one: one.eps)
    for entry in widest.values():
        for eps in (entry.eps * np.arange(1, POINTS) / POINTS).tolist():
            nearer = replace(entry, eps=eps)
            yield replace(nearer, outcome=entry.outcome.within(_limit(nearer)))


def distances(entries: Iterable[Entry]) -> pd.DataFrame:
    """Histograms of the distances of what broke an input, a row a bar [``above``, ``up_to``), the last one closed:
    ``share`` is of the inputs that were attacked. Distances are as the norm measures them: a patch's is its side."""
    table = []
    for line, group in enumerate(grouped(entries)):
        for entry in group:
            found, tried = entry.outcome.distance[entry.outcome.status == BROKEN], _tried(entry)
            if not len(found) or not np.isfinite(found).all():
                continue
            inputs, edges = np.histogram(np.minimum(found, top := _limit(entry)), BARS, (0, top))
            for count, above, up_to in zip(inputs.tolist(), edges.tolist(), edges[1:].tolist()):
                bar = {"attack": entry.attack, "above": above, "up_to": up_to, "inputs": count, "share": count / tried}
                table.append({**_about(line, entry), **bar})
    return _frame(table)


def _limit(entry: Entry) -> float:
    """The largest distance that there can be."""
    shape = entry.outcome.images.shape[1:] or (1,)
    return float(NORMS[entry.norm].limit(entry.eps, torch.empty(1, *shape)))


def queries(entries: Iterable[Entry]) -> pd.DataFrame:
    """How much of its ``success`` each attack has had after so many ``forwards``, at 1, 2, 5, 10, ... up to the most
    that any input took. An attack that goes on to come nearer has all of it only then."""
    table = []
    for line, group in enumerate(grouped(entries)):
        for entry in group:
            tried, spent = _tried(entry), np.sort(entry.outcome.forwards[entry.outcome.status == BROKEN])
            if not tried or not entry.outcome.forwards.any():
                continue
            for forwards in _steps(int(entry.outcome.forwards.max())):
                done = int(np.searchsorted(spent, forwards, "right"))
                at = {"attack": entry.attack, "forwards": forwards, "broken": done, "success": done / tried}
                table.append({**_about(line, entry), **at})
    return _frame(table)


def trainings(found: Iterable[Entry | Proof]) -> pd.DataFrame:
    """A row an epoch of each model whose training is known; ``line`` numbers the models, and the rest is
    ``TRAININGS``."""
    import pandas as pd

    models = {(one.dataset, one.defense, one.model, one.subject): one.history for one in found if one.history}
    table = [
        (line, dataset, defense, model, *epoch)
        for line, ((dataset, defense, model, _), history) in enumerate(models.items())
        for epoch in history
    ]
    return pd.DataFrame(table, columns=["line", *TRAININGS]).astype({"robust_accuracy": float})


def _steps(most: int) -> list[int]:
    """1, 2, 5, 10, ... up to the first that is ``most`` or more."""
    steps = [1]
    while steps[-1] < most:
        steps.append(int((1, 2, 5)[len(steps) % 3] * 10 ** (len(steps) // 3)))
    return steps


def _tried(entry: Entry) -> int:
    return int((~np.isin(entry.outcome.status, (WRONG, SKIPPED))).sum())


def _about(line: int, entry: Entry) -> dict[str, Any]:
    return {"line": line, **{name: getattr(entry, name) for name in ABOUT}}


def _frame(table: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(table)
