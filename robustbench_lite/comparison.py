"""What changed between two sets of results, input by input, and whether it is more than noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_lite.chance import mcnemar
from robustbench_lite.entries import Entry, Proof, Setting, certified_by, grouped, robust, verified
from robustbench_lite.outcome import VERIFIED, Certified, Outcome

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from robustbench_lite.matrix import Results

COMPARISON = (
    "dataset",
    "defense",
    "model",
    "norm",
    "eps",
    "seed",
    "adaptive",
    "same_model",
    "accuracy",
    "plugin",
    "examples",
    "before",
    "after",
    "change",
    "lost",
    "gained",
    "p_value",
)
CLEAN, ROBUST, CERTIFIED = "clean", "robust", "certified"
LEVEL = 0.05  # what is likelier than this by chance may be noise

Place = tuple[Any, ...]  # the first seven columns


@dataclass(frozen=True)
class Counted:
    """The inputs of an accuracy, and which of them it counts."""

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    counts: NDArray[np.bool_]


Accuracies = dict[tuple[str, str], Counted]  # by kind and plugin; without one: the leaderboard's


def compare(before: Results, after: Results) -> pd.DataFrame:
    """A line an accuracy: clean, robust and certified as in the leaderboard, and those of each attack and certifier.

    The columns are those of ``COMPARISON``. Two accuracies are compared on the inputs that both have; ``lost`` and
    ``gained`` are how many count only before or only after, ``p_value`` is that of :func:`.chance.mcnemar`, and
    ``same_model`` says whether weights and data are the same. One that is on one side only has no other figure.
    """
    import pandas as pd

    one, other = _accuracies(before.entries, before.proofs), _accuracies(after.entries, after.proofs)
    lines = [
        dict(zip(COMPARISON, (*place, same, *key, *figures)))
        for place in dict.fromkeys([*one, *other])
        for same, left, right in _pairs(one.get(place, {}), other.get(place, {}))
        for key in sorted({*left, *right}, key=lambda key: ([CLEAN, ROBUST, CERTIFIED].index(key[0]), key[1]))
        for figures in _figures(left.get(key), right.get(key))
    ]
    counts = dict.fromkeys(("lost", "gained"), "Int64")
    return pd.DataFrame(lines, columns=list(COMPARISON)).astype({**counts, "same_model": "boolean"})


def changed(comparison: pd.DataFrame) -> pd.Series[bool]:
    """Which lines of a comparison say that anything differs."""
    return (comparison["lost"].fillna(1) + comparison["gained"].fillna(1)) > 0


def _accuracies(entries: Iterable[Entry], proofs: Sequence[Proof]) -> dict[Place, dict[str, Accuracies]]:
    """What is to compare at each place, by model."""
    found: dict[Place, dict[str, Accuracies]] = {}

    def add(of: Setting, kind: str, plugin: str, about: Outcome | Certified, counts: NDArray[np.bool_]) -> None:
        place = tuple(getattr(of, name) for name in COMPARISON[:7])
        here = found.setdefault(place, {}).setdefault(of.subject, {})
        here.setdefault((kind, plugin), Counted(about.row, about.label, counts))

    for group in grouped(entries, proofs):
        first, outcomes = group[0], [entry.outcome for entry in group]
        add(first, CLEAN, "", outcomes[0], outcomes[0].right)
        add(first, ROBUST, "", outcomes[0], robust(outcomes))
        for entry in group:
            add(entry, ROBUST, entry.attack, entry.outcome, robust([entry.outcome]))
        if asked := certified_by(first.row, outcomes[0].row, proofs):
            add(first, CERTIFIED, "", outcomes[0], verified(asked))
    for proof in proofs:
        add(proof, CLEAN, "", proof.certified, proof.certified.right)
        add(proof, CERTIFIED, proof.certifier, proof.certified, proof.certified.status == VERIFIED)
    return found


def _pairs(
    one: dict[str, Accuracies], other: dict[str, Accuracies]
) -> Iterator[tuple[bool | None, Accuracies, Accuracies]]:
    """Each model with itself; one that is left on either side with the other."""
    for subject in (subject for subject in one if subject in other):
        yield True, one[subject], other[subject]
    left = [one[subject] for subject in one if subject not in other]
    right = [other[subject] for subject in other if subject not in one]
    if len(left) == len(right) == 1:
        yield False, left[0], right[0]
    else:
        yield from ((None, each, {}) for each in left)
        yield from ((None, {}, each) for each in right)


def _figures(one: Counted | None, other: Counted | None) -> Iterator[tuple[Any, ...]]:
    """The last columns; where the two are not about the same inputs, a line each."""
    if one and other:
        rows, left, right = np.intersect1d(one.row, other.row, return_indices=True)
        if len(rows) and np.array_equal(one.label[left], other.label[right]):
            before, after = one.counts[left], other.counts[right]
            lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
            change = (gained - lost) / len(rows)
            yield len(rows), before.mean(), after.mean(), change, lost, gained, mcnemar(before, after)
            return
    if one:
        yield len(one.row), one.counts.mean(), np.nan, np.nan, None, None, np.nan
    if other:
        yield len(other.row), np.nan, other.counts.mean(), np.nan, None, None, np.nan
