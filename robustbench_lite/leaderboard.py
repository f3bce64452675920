"""Tables from raw rows: pure functions, so that every figure can be worked out anew from what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_lite import __version__
from robustbench_lite.chance import mcnemar, wilson
from robustbench_lite.entries import Entry, Proof, by_draw, certified_by, detection, grouped, robust, unknown, verified
from robustbench_lite.outcome import (
    FALSIFIED,
    UNKNOWN,
    UNSUPPORTED,
    VERIFIED,
)

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
