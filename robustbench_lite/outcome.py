"""What became of each input of a cell: raw rows, from which every figure is derived."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 100  # consecutive rows that are attacked, stored and resumed as one
KEPT = 16  # adversarial images that every chunk keeps
WRONG, BROKEN, HELD, UNKNOWN, SKIPPED = "wrong", "broken", "held", "unknown", "skipped"
ERROR = "error: "  # begins the reason of what failed
REJECTED = -2  # the label of an input that a detector rejects
VERIFIED, FALSIFIED, UNSUPPORTED = "verified", "falsified", "unsupported"
FINITE, NAN, ZERO, SATURATED, UNSEEN = "finite", "nan", "zero", "saturated", "unseen"  # gradients


class Unfinished(Exception):
    """In place of an attack or a certifier that did not come to its end, and may another time."""


class Rows:
    """A frozen dataclass of columns with one entry an input, and ``images`` (K, ...) of the inputs ``imaged``: of
    those, or of the first of those, whose status is ``pictured``."""

    row: NDArray[np.int64]
    clean: NDArray[np.int64]
    status: NDArray[np.str_]
    reason: NDArray[np.str_]
    imaged: NDArray[np.int64]
    images: NDArray[np.float32]
    pictured: ClassVar[str]

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """The fields with one entry an input."""
        return tuple(name for name in cls.arrays() if name not in ("imaged", "images"))

    @classmethod
    def arrays(cls) -> tuple[str, ...]:
        """All fields."""
        return tuple(field.name for field in fields(cast(Any, cls)))

    def __len__(self) -> int:
        return len(self.row)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which clean inputs the model is known to classify correctly."""
        right: NDArray[np.bool_] = (self.status != WRONG) & (self.clean != -1)
        return right

    @property
    def unfinished(self) -> bool:
        """Whether there is an input for which there was no answer, see :class:`Unfinished`."""
        return bool(np.char.startswith(self.reason, f"{ERROR}{Unfinished.__name__}: ").any())

    @property
    def complete(self) -> bool:
        """Whether every image is there that could be."""
        return len(self.imaged) == int((self.status == self.pictured).sum())

    def part(self, start: int, stop: int) -> Self:
        """The inputs whose row lies in [start, stop), with their images."""
        return self.select(np.arange(start, stop))

    def select(self, rows: NDArray[np.int64]) -> Self:
        """The inputs whose row is one of ``rows``, with their images."""
        here, imaged = np.isin(self.row, rows), np.isin(self.imaged, rows)
        columns = {name: getattr(self, name)[here] for name in self.columns()}
        images = {"imaged": self.imaged[imaged], "images": self.images[imaged]}
        return type(self)(**columns, **images)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One of several, in order of rows."""
        parts = sorted(parts, key=lambda part: int(part.row[0]))
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.arrays()})

    def to_frame(self) -> "pd.DataFrame":
        """A row an input, without the images."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in self.columns()})


@dataclass(frozen=True)
class Outcome(Rows):
    """What became of each input under an attack.

    ``status`` is ``wrong`` (misclassified when clean, not attacked), ``broken`` (an admissible adversarial that the
    model was asked about again), ``held``, ``unknown`` (``reason`` says why; never robust, never a success) or
    ``skipped`` (its label is the target). ``clean`` and ``adversarial`` are the model's labels for the input and for
    the judged point: -1 where there is none, ``REJECTED`` where that is a detector's. ``distance`` is the size of the
    perturbation of a point that broke the input, or was rejected. ``share`` is that of the answers to the judged point
    (to the clean one where none was judged) that were the label: 0 or 1, unless the model is stochastic and answers
    several times; NaN where the judged point lies beyond eps. ``images`` (K, ...) are adversarials, of the rows
    ``imaged``.
    """

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    clean: NDArray[np.int64]
    adversarial: NDArray[np.int64]
    status: NDArray[np.str_]
    reason: NDArray[np.str_]
    distance: NDArray[np.float64]
    share: NDArray[np.float64]
    forwards: NDArray[np.int64]
    backwards: NDArray[np.int64]
    seconds: NDArray[np.float64]
    imaged: NDArray[np.int64]
    images: NDArray[np.float32]

    pictured = BROKEN

    @property
    def fooled(self) -> NDArray[np.bool_]:
        """Where the model gave the judged point another label than the true one, the target's or not; to be rejected
        is no label."""
        fooled: NDArray[np.bool_] = (self.status == BROKEN) | (
            (self.adversarial >= 0) & (self.adversarial != self.label)
        )
        return fooled

    def within(self, limit: float) -> "Outcome":
        """The outcome at a smaller budget: what was broken at a larger distance is held (unknown, where the attack
        failed then), and a label that was reached at an unknown distance (of a targeted attack: another than the
        target) is forgotten."""
        near = self.distance <= limit
        beyond = (self.status == BROKEN) & ~near
        kept = ~np.isin(self.imaged, self.row[beyond])
        return replace(
            self,
            status=np.where(beyond, np.where(self.reason == "", HELD, UNKNOWN), self.status),
            reason=np.where((self.status == BROKEN) & near, "", self.reason),
            adversarial=np.where(near, self.adversarial, -1),
            distance=np.where(near, self.distance, np.nan),
            share=np.where(beyond, np.nan, self.share),
            imaged=self.imaged[kept],
            images=self.images[kept],
        )


@dataclass(frozen=True)
class Certified(Rows):
    """What is proved of each input.

    ``status`` is ``wrong`` (misclassified when clean, nothing to prove), ``verified`` within eps, ``falsified`` (by a
    point of the ball that the model was asked about again), ``unknown`` or ``unsupported``; ``reason`` says why.
    ``certified`` is the label that holds in the whole ball, -1 where none is proved; ``radius``, in eps's unit, how far
    the input's own label is proved to hold; ``margin`` a lower bound over the ball on its logit minus the best other
    one, NaN where there is none. ``images`` are counterexamples.
    """

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    clean: NDArray[np.int64]
    certified: NDArray[np.int64]
    status: NDArray[np.str_]
    reason: NDArray[np.str_]
    radius: NDArray[np.float64]
    margin: NDArray[np.float64]
    seconds: NDArray[np.float64]
    imaged: NDArray[np.int64]
    images: NDArray[np.float32]

    pictured = FALSIFIED


@dataclass(frozen=True)
class Probed(Rows):
    """What a short look at the model showed of each input, see :mod:`robustbench_lite.probing`.

    ``status`` is that under an attack to which the whole pixel range is allowed, ``noise`` that under random noise
    within eps. ``gradient`` is ``finite``, ``nan``, ``zero``, or ``saturated`` where only the cross-entropy's is zero,
    the margin's not; of a black box it is ``unseen``, and the status ``unknown``. ``low`` and ``high`` are the extreme
    logits. In a second pass the label was ``again``, and a logit had ``moved`` by at most this share of high - low.
    There are no images.
    """

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    clean: NDArray[np.int64]
    again: NDArray[np.int64]
    moved: NDArray[np.float64]
    status: NDArray[np.str_]
    noise: NDArray[np.str_]
    gradient: NDArray[np.str_]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seconds: NDArray[np.float64]
    imaged: NDArray[np.int64]
    images: NDArray[np.float32]

    pictured = "none"


COLUMNS = Outcome.columns()
