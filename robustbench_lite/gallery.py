"""Images for a page: what broke an input beside the input itself, and patches, as PNG inside their own addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robustbench_lite import data
from robustbench_lite.entries import Entry
from robustbench_lite.outcome import BROKEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

A_CELL, A_PAGE = 4, 240  # inputs that are shown, at most
SIDE = 64  # pixels of the longest side; larger images are made smaller


@dataclass(frozen=True)
class Picture:
    """An input and what broke it; without ``clean`` and ``difference`` where the data set is not at hand."""

    row: int
    label: int
    answer: int  # of the model, to the adversarial
    distance: float
    clean: str
    adversarial: str
    difference: str
    gain: float  # how often its own size the difference is shown


@dataclass(frozen=True)
class Shown:
    """What an attack did to some inputs; ``lacking`` says why there is less to see than there should be."""

    entry: Entry
    pictures: list[Picture]
    lacking: str


def pictures(entries: Sequence[Entry], data_dir: Path | None) -> Iterator[Shown]:
    """The first inputs that each attack broke, as many for each as fit on a page."""
    there = [entry for entry in entries if len(entry.outcome.imaged) and shows(entry.outcome.images[0])]

    @cache
    def clean(name: str, fingerprint: str) -> NDArray[np.float32] | str:
        try:
            images = data.load(name, "test", data_dir)
        except (ValueError, OSError):
            return f"{name} is not at hand: its clean images are left out"
        if images.fingerprint != fingerprint:
            return f"{name} is no longer the data that was attacked: its clean images are left out"
        return images.x.numpy()

    for entry in there:
        kept = entry.outcome.imaged[: max(1, min(A_CELL, A_PAGE // len(there)))]
        found = "" if entry.cell is None else clean(entry.dataset, entry.cell.identity["data"])
        whole = None if isinstance(found, str) else found
        yield Shown(entry, [_picture(entry, int(row), whole) for row in kept], found if isinstance(found, str) else "")


def _picture(entry: Entry, row: int, clean: NDArray[np.float32] | None) -> Picture:
    outcome = entry.outcome
    at, image = int(np.flatnonzero(outcome.row == row)[0]), outcome.images[outcome.imaged == row][0]
    assert outcome.status[at] == BROKEN
    difference = None if clean is None else image - clean[row]
    most = 0.0 if difference is None else float(np.abs(difference).max())
    gain = 0.5 / most if most else 1.0
    return Picture(
        row=row,
        label=int(outcome.label[at]),
        answer=int(outcome.adversarial[at]),
        distance=float(outcome.distance[at]),
        clean="" if clean is None else png(clean[row]),
        adversarial=png(image),
        difference="" if difference is None else png(0.5 + gain * difference),
        gain=gain,
    )


def patches(entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """The patches that attacks have learned."""
    learned = [(entry, entry.learned) for entry in entries if entry.learned is not None]
    return [(entry, png(patch)) for entry, patch in learned if shows(patch)]


def shows(image: NDArray[np.float32]) -> bool:
    """Whether this is an image that can be shown: (1 or 3, height, width)."""
    return image.ndim == 3 and len(image) in (1, 3) and image.size > 0


def png(image: NDArray[np.float32]) -> str:
    """The address of an image (C, H, W) with values in [0, 1]."""
    from PIL import Image

    levels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    made, file = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)), io.BytesIO()
    made.thumbnail((SIDE, SIDE))
    made.save(file, "png")
    return uri("image/png", file.getvalue())


def uri(kind: str, content: bytes) -> str:
    """An address that holds what it is the address of."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
