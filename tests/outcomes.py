"""Outcomes made up by hand, and how to compare them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from robustbench_lite.outcome import BROKEN, COLUMNS, HELD, SKIPPED, UNKNOWN, WRONG, Outcome

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
        "forwards": np.full(count, 3),
        "backwards": np.full(count, 2),
        "seconds": np.full(count, 0.5),
        "imaged": row[broken],
        "images": np.arange(4 * broken.sum(), dtype=np.float32).reshape(-1, 1, 2, 2),
    }
    given = {name: np.asarray(values) for name, values in columns.items()}
    return Outcome(**(usual | given))


def assert_same(one: Outcome, other: Outcome, but: Sequence[str] = ()) -> None:
    for field in fields(Outcome):
        if field.name not in but:
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def assert_same_types(one: Outcome, other: Outcome) -> None:
    for name in COLUMNS:
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
