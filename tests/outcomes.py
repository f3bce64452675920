"""Outcomes made up by hand, and how to compare them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from robustbench_lite.outcome import (
    BROKEN,
    FALSIFIED,
    FINITE,
    HELD,
    SKIPPED,
    UNKNOWN,
    UNSUPPORTED,
    VERIFIED,
    WRONG,
    Certified,
    Outcome,
    Probed,
    Rows,
)
from robustbench_lite.runner import Watcher
from robustbench_lite.threat import ThreatModel

LETTERS = {"w": WRONG, "b": BROKEN, "h": HELD, "u": UNKNOWN, "s": SKIPPED}


def made(letters: str, start: int = 0, **columns: Any) -> Outcome:
    """An outcome with a status a letter; all labels are 0, the adversarial ones 1."""
    count = len(letters)
    status = np.array([LETTERS[letter] for letter in letters])
    broken = status == BROKEN
    row = np.arange(start, start + count)
    usual: dict[str, Any] = {
        "row": row,
        "label": np.zeros(count, np.int64),
        "clean": (status == WRONG).astype(np.int64),
        "adversarial": np.where(broken, 1, -1),
        "status": status,
        "reason": np.where(status == UNKNOWN, 'error: it fell over, "badly"', ""),
        "distance": np.where(broken, 0.25, np.nan),
        "share": np.where(broken | (status == WRONG), 0.0, 1.0),
        "forwards": np.full(count, 3),
        "backwards": np.full(count, 2),
        "seconds": np.full(count, 0.5),
        "imaged": row[broken],
        "images": np.arange(4 * broken.sum(), dtype=np.float32).reshape(-1, 1, 2, 2),
    }
    given = {name: np.asarray(values) for name, values in columns.items()}
    return Outcome(**(usual | given))


VERDICTS = {"w": WRONG, "v": VERIFIED, "f": FALSIFIED, "u": UNKNOWN, "n": UNSUPPORTED}


def proved(letters: str, start: int = 0, **columns: Any) -> Certified:
    """What is proved, a status a letter; all labels are 0, and what is verified has radius 0.1."""
    count = len(letters)
    status = np.array([VERDICTS[letter] for letter in letters])
    row = np.arange(start, start + count)
    usual: dict[str, Any] = {
        "row": row,
        "label": np.zeros(count, np.int64),
        "clean": (status == WRONG).astype(np.int64),
        "certified": np.where(status == VERIFIED, 0, -1),
        "status": status,
        "reason": np.where(status == UNSUPPORTED, "layer 3 (Softmax)", ""),
        "radius": np.where(status == VERIFIED, 0.1, 0.0),
        "margin": np.where(status == VERIFIED, 1.5, np.nan),
        "seconds": np.full(count, 0.5),
        "imaged": row[status == FALSIFIED],
        "images": np.ones(((status == FALSIFIED).sum(), 1, 2, 2), np.float32),
    }
    given = {name: np.asarray(values) for name, values in columns.items()}
    return Certified(**(usual | given))


def looked_at(count: int, **columns: Any) -> Probed:
    """A probe that finds no fault."""
    zeros = np.zeros(count, np.int64)
    usual: dict[str, Any] = {
        "row": np.arange(count),
        "label": zeros,
        "clean": zeros,
        "again": zeros,
        "moved": np.zeros(count),
        "status": np.full(count, BROKEN),
        "noise": np.full(count, HELD),
        "gradient": np.full(count, FINITE),
        "low": np.full(count, -5.0),
        "high": np.full(count, 5.0),
        "seconds": np.full(count, 0.5),
        "imaged": zeros[:0],
        "images": np.zeros((0, 1, 2, 2), np.float32),
    }
    return Probed(**(usual | {name: np.asarray(values) for name, values in columns.items()}))


def assert_same(one: Rows, other: Rows, but: Sequence[str] = ()) -> None:
    assert type(one) is type(other)
    for name in one.arrays():
        if name not in but:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_same_types(one: Rows, other: Rows) -> None:
    for name in one.columns():
        assert getattr(one, name).dtype == getattr(other, name).dtype, name


class Notes(Watcher):
    """Remembers what a run says, and counts its inputs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.inputs = self.expected = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def planned(self, inputs: int) -> None:
        self.expected += inputs

    def advanced(self, defense: str, plugin: str, threat: ThreatModel, inputs: int) -> None:
        self.inputs += inputs
