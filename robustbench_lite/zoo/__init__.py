"""Trained weights that ship: ``manifest.toml`` says of each file what it is and what was measured."""

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shipped:
    """One entry of the manifest; accuracies are measured on the first ``examples`` test images of the data set."""

    file: str
    sha256: str
    dataset: str
    model: str
    defense: str
    seed: int
    examples: int
    clean_accuracy: float
    robust_accuracy: float
    threat: str
    attack: str
    command: str
    version: str
    certified_accuracy: float | None = None  # of recipes that train for it, by ``certifier``
    certifier: str = ""


@cache
def manifest() -> tuple[Shipped, ...]:
    """All that ships."""
    entries = tomllib.loads((FOLDER / "manifest.toml").read_text())["weights"]
    return tuple(Shipped(**entry) for entry in entries)


def load(entry: Shipped) -> dict[str, Tensor]:
    """The weights of an entry, in float32.

    Raises:
        ValueError: where the file is not the one that the manifest describes.
    """
    from safetensors.torch import load as from_bytes

    path = FOLDER / entry.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; install the package again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise ValueError(f"{path} has SHA-256 {found[:12]}..., not {entry.sha256[:12]}...; install the package again")
    return {name: tensor.float() for name, tensor in from_bytes(content).items()}
