"""Entries as RobustBench keeps them in its folder ``model_info`` (Croce et al., 2021): read, joined and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_lite import specs
from robustbench_lite.wording import one_line

if TYPE_CHECKING:
    import pandas as pd

EVALUATED, REPORTED = "evaluated", "reported"  # a row's source
BLOCK = ["dataset", "norm", "eps"]  # what is ranked with each other, wherever it comes from
COUNTS = ("rank", "parameters", "examples", "unknown", "seed")  # of which an entry reports none


def read(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The entries below a folder as leaderboard rows, of which they fill some columns. A file holds one entry, whose
    norm is the name of its folder, or a list as :func:`text` writes it; ``note`` is told of each that cannot be used.

    Raises:
        ValueError: where there is no such file.
    """
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ValueError(f"there are no entries of RobustBench (*.json) in {folder}")
    rows = []
    for file in files:
        try:
            rows += list(_rows(json.loads(file.read_bytes()), file))
        except (OSError, ValueError, RecursionError) as error:
            note(f"{file} cannot be used and is left out ({one_line(error, named=False)})")
    return rows


def _rows(content: Any, file: Path) -> Iterator[dict[str, Any]]:
    for entry in content if isinstance(content, list) else [content]:
        if not isinstance(entry, dict):
            raise ValueError("an entry must be an object")
        lacking = [key for key in ("name", "dataset", "architecture", "eps", "clean_acc") if key not in entry]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if entry["eps"] is None:  # common corruptions: no threat model
            continue
        robust = {
            name: _fraction(entry[key])
            for key, name in (("autoattack_acc", "autoattack"), ("external", "external"))
            if entry.get(key) is not None
        }
        if not robust:
            raise ValueError("it has neither autoattack_acc nor external")
        yield {
            "dataset": str(entry["dataset"]).lower(),
            "defense": str(entry["name"] if isinstance(content, list) else file.stem),
            "model": str(entry["architecture"]),
            "norm": str(entry.get("norm", file.parent.name)).lower(),
            "eps": specs.read(str(entry["eps"]), float),
            "clean_accuracy": _fraction(entry["clean_acc"]),
            "robust_accuracy": min(robust.values()),
            "worst_attack": min(robust, key=lambda name: robust[name]),
            "attacks": "; ".join(robust),
            "flags": "unreliable" if entry.get("unreliable") else "",
        }


def _fraction(percent: Any) -> float:
    """A percentage, text or number, as the fraction that counting gives."""
    fraction = round(float(specs.read(str(percent), float)) / 100, 6)
    if not 0 <= fraction <= 1:
        raise ValueError(f"an accuracy must be 0 to 100 %, not {percent}")
    return fraction


def joined(board: pd.DataFrame, reported: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A leaderboard, and what others report for its data sets and threat models: ranked together, in order of rank.

    The new column ``source`` tells them apart; what is reported was not evaluated here, and is on other examples.
    """
    import pandas as pd

    blocks = {tuple(block) for block in board[BLOCK].itertuples(index=False)}
    there = [row for row in reported if tuple(row[name] for name in BLOCK) in blocks]
    numbers = {name: pd.api.types.is_numeric_dtype(board[name]) for name in board.columns}
    unsaid: dict[str, Any] = {name: np.nan if number else "" for name, number in numbers.items()}
    unsaid |= {"adaptive": True, "source": REPORTED, **dict.fromkeys(COUNTS, pd.NA)}
    lines: list[Any] = board.assign(source=EVALUATED).to_dict("records")
    lines += [unsaid | row for row in there]
    both = pd.DataFrame(lines, columns=["rank", "source", *board.columns.drop("rank")])
    both = both.astype(dict.fromkeys(COUNTS, "Int64"))
    ranked = both[both["adaptive"].astype(bool)].groupby(BLOCK, sort=False)["robust_accuracy"]
    both["rank"] = ranked.rank("min", ascending=False).reindex(both.index).astype("Int64")
    block = both.groupby(BLOCK, sort=False).ngroup()
    order = both.assign(block=block).sort_values(["block", "rank"], kind="stable").index
    still = [here for above, here in pairwise(order) if above == here - 1]
    both["p_above"] = both["p_above"].where(both.index.isin(still))
    return both.loc[order].reset_index(drop=True)


def text(board: pd.DataFrame) -> str:
    """A list of the leaderboard's own entries, but for those of blind attacks, with RobustBench's keys and ``norm``.

    ``reported`` is the robust accuracy; the same is ``autoattack_acc`` where the standard cascade is among the attacks,
    and else ``external``. What a leaderboard does not know is null or empty.
    """
    own = board[board["adaptive"].astype(bool)]
    own = own[own["source"] == EVALUATED] if "source" in own else own
    return json.dumps([_entry(row) for _, row in own.iterrows()], indent=2) + "\n"


def _entry(row: Any) -> dict[str, Any]:
    robust, cascade = _percent(row["robust_accuracy"]), "autoattack" in row["attacks"].split("; ")
    low, high = _percent(row["robust_low"]), _percent(row["robust_high"])
    return {
        "link": "",
        "name": row["defense"],
        "authors": "",
        "additional_data": None,
        "number_forward_passes": None,
        "dataset": row["dataset"],
        "venue": "N/A",
        "architecture": row["model"],
        "norm": row["norm"].capitalize(),
        "eps": eps_text(row["eps"]),
        "clean_acc": _percent(row["clean_accuracy"]),
        "reported": robust,
        "autoattack_acc": robust if cascade else None,
        **({} if cascade else {"external": robust}),
        "footnote": f"On {row['examples']} test images, against {row['attacks']}; 95 % interval {low} to {high}; "
        f"robust-bench {row['version']}, seed {row['seed']}.",
        "unreliable": bool(row["flags"]),
    }


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def eps_text(eps: float) -> str:
    """The shortest of ``0.3``, ``8/255`` and all digits that is read as the same number."""
    texts = (f"{eps:g}", f"{round(255 * eps)}/255", repr(eps))
    return next(text for text in texts if specs.read(text, float) == eps)
