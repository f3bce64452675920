"""What became of each input of a cell: raw rows, from which every figure is derived."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 100  # consecutive rows that are attacked, stored and resumed as one
KEPT = 16  # adversarial images that every chunk keeps
WRONG, BROKEN, HELD, UNKNOWN, SKIPPED = "wrong", "broken", "held", "unknown", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of each input; every column but the images has one entry an input.

    ``status`` is ``wrong`` (misclassified when clean, not attacked), ``broken`` (an admissible adversarial that the
    model was asked about again), ``held``, ``unknown`` (``reason`` says why; never robust, never a success) or
    ``skipped`` (its label is the target). ``adversarial`` is the model's label for the judged point, -1 where there is
    none; ``distance`` the size of a broken input's perturbation. ``images`` (K, ...) are adversarials, of the rows
    ``imaged``.
    """

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    clean: NDArray[np.int64]
    adversarial: NDArray[np.int64]
    status: NDArray[np.str_]
    reason: NDArray[np.str_]
    distance: NDArray[np.float64]
    forwards: NDArray[np.int64]
    backwards: NDArray[np.int64]
    seconds: NDArray[np.float64]
    imaged: NDArray[np.int64]
    images: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row)

    @property
    def fooled(self) -> NDArray[np.bool_]:
        """Where the model gave the judged point another label than the true one, the target's or not."""
        fooled: NDArray[np.bool_] = (self.status == BROKEN) | (
            (self.adversarial >= 0) & (self.adversarial != self.label)
        )
        return fooled

    def within(self, limit: float) -> "Outcome":
        """The outcome at a smaller budget: what was broken at a larger distance is held, and a label that was
        reached at an unknown distance (of a targeted attack: another than the target) is forgotten."""
        beyond = (self.status == BROKEN) & (self.distance > limit)
        near = ~np.isin(self.imaged, self.row[beyond])
        return replace(
            self,
            status=np.where(beyond, HELD, self.status),
            adversarial=np.where((self.status == BROKEN) & ~beyond, self.adversarial, -1),
            distance=np.where(beyond, np.nan, self.distance),
            imaged=self.imaged[near],
            images=self.images[near],
        )

    def part(self, start: int, stop: int) -> "Outcome":
        """The inputs whose row lies in [start, stop), with their images."""
        return self.select(np.arange(start, stop))

    def select(self, rows: NDArray[np.int64]) -> "Outcome":
        """The inputs whose row is one of ``rows``, with their images."""
        here, imaged = np.isin(self.row, rows), np.isin(self.imaged, rows)
        columns: dict[str, Any] = {name: getattr(self, name)[here] for name in COLUMNS}
        return Outcome(**columns, imaged=self.imaged[imaged], images=self.images[imaged])

    @staticmethod
    def join(parts: Sequence["Outcome"]) -> "Outcome":
        """One outcome of several, in order of rows."""
        parts = sorted(parts, key=lambda part: int(part.row[0]))
        columns: Any = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Outcome)}
        return Outcome(**columns)

    def to_frame(self) -> "pd.DataFrame":
        """A row an input, without the images."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in COLUMNS})


COLUMNS = tuple(f.name for f in fields(Outcome) if f.name not in ("imaged", "images"))
