"""Results on disk: a folder a cell, a file a chunk of rows; written whole or not at all, checked when read."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.files import replacing
from robustbench_lite.history import History, parse, to_text
from robustbench_lite.outcome import Certified, Outcome, Probed

Chunk = Outcome | Certified | Probed

SCHEMA = 4
_ROWS = f"rows of schema {SCHEMA}"
_CHUNK_NAME = re.compile(r"([0-9]{8})-([0-9]{8})\.npz")


@dataclass(frozen=True)
class Cell:
    """An attack against a defended model, a certifier, or a probe: ``identity`` is all that changes the answer for a
    row, ``about`` the rest."""

    identity: dict[str, Any]
    about: dict[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 of the identity; the name of the cell's folder."""
        text = json.dumps({"schema": SCHEMA, **self.identity}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def kind(self) -> type[Chunk]:
        """What its chunks hold."""
        if "probe" in self.identity:
            return Probed
        return Certified if "certifier" in self.identity else Outcome


class Store:
    """The chunks below a results folder. ``warn`` is told of each chunk that cannot be used.

    Raises:
        ValueError: where the folder cannot be written.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self._warn = folder, warn
        self._warned: set[str] = set()

    def warn(self, text: str) -> None:
        """Says something once."""
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)

    def prepare(self) -> None:
        """Makes the folder and sees that it can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to the results folder {self.folder}: {error.strerror}") from error

    def path(self, cell: Cell, start: int, stop: int) -> Path:
        """Where a chunk is, or will be."""
        return self.folder / "cells" / cell.key / f"{start:08d}-{stop:08d}.npz"

    def load(self, cell: Cell, start: int, stop: int, keep_all: bool = False) -> Chunk | None:
        """What became of rows [start, stop), if a sound chunk is there (and, where wanted, holds all images)."""
        path = self.path(cell, start, stop)
        if not path.exists():
            return None
        try:
            chunk = _read(path, cell.kind)
        except Exception as error:  # a damaged zip raises anything
            self.warn(f"{path} cannot be used and is computed again ({type(error).__name__}: {error})")
            return None
        if not np.array_equal(chunk.row, np.arange(start, stop)):
            self.warn(f"{path} holds other rows than its name says and is computed again")
            return None
        return chunk if chunk.complete or not keep_all else None

    def save(self, cell: Cell, chunk: Chunk) -> None:
        """Writes a chunk under its final name in one step."""
        path = self.path(cell, int(chunk.row[0]), int(chunk.row[-1]) + 1)
        about = path.parent / "cell.json"
        if not about.exists():
            with _writing(about) as part:
                part.write_bytes(json.dumps({"identity": cell.identity, "about": cell.about}, indent=1).encode())
        with _writing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **cast(Any, {_ROWS: _table(chunk), "images": chunk.images}))

    def learned(self, cell: Cell) -> Tensor | None:
        """What the attack of a cell has learned, if it is there and sound."""
        from safetensors import safe_open

        path = self._learned(cell)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                learned, stated = cast(Tensor, file.get_tensor("learned")), file.metadata()["sha256"]
            if _hash(learned) != stated:
                raise ValueError("another hash than it states")
        except Exception as error:  # safetensors has errors of its own
            self.warn(f"{path} cannot be used: it and its chunks are computed again ({type(error).__name__}: {error})")
            return None
        return learned

    def learn(self, cell: Cell, learned: Tensor) -> None:
        """Keeps what the attack of a cell has learned, and drops the chunks that rest on anything else."""
        from safetensors.torch import save

        path, learned = self._learned(cell), learned.cpu().contiguous()
        with _writing(path) as part:
            for chunk in path.parent.glob("*.npz"):
                chunk.unlink(missing_ok=True)
            part.write_bytes(save({"learned": learned}, {"sha256": _hash(learned)}))

    def history(self, cell: Cell) -> History:
        """How the model of a cell was trained, if that is known."""
        path = self._trained(cell)
        try:
            return parse(path.read_text("utf-8"))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            self.warn(f"{path} cannot be used, and there is no training curve ({error})")
            return ()

    def remember(self, cell: Cell, history: History) -> None:
        """Keeps how the model of a cell was trained, once for all cells."""
        if history and not self.history(cell):
            with _writing(self._trained(cell)) as part:
                part.write_bytes(to_text(history).encode())

    def ask(self, cell: Cell, eps: float) -> None:
        """Remembers that a cell whose key has no eps was asked about this one."""
        path = self.folder / "cells" / cell.key / f"eps={eps!r}"
        with _writing(path) as part:
            part.touch()

    def asked(self, cell: Cell) -> set[float]:
        """Every eps that a cell whose key has none was asked about."""
        return {float(path.name[4:]) for path in (self.folder / "cells" / cell.key).glob("eps=*")}

    def cells(self) -> Iterator[tuple[Cell, list[Chunk]]]:
        """Every cell of the folder, with the chunks that it has."""
        for about in sorted(self.folder.glob("cells/*/cell.json")):
            try:
                content = json.loads(about.read_text())
                cell = Cell(content["identity"], content["about"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.warn(f"{about} cannot be read and is left out ({type(error).__name__}: {error})")
                continue
            if cell.key != about.parent.name:
                self.warn(f"{about} does not belong to its folder, or to another version, and is left out")
                continue
            names = filter(None, (_CHUNK_NAME.fullmatch(path.name) for path in about.parent.iterdir()))
            spans = sorted((int(name[1]), int(name[2])) for name in names)
            chunks = [self.load(cell, *span) for span in _disjoint(spans)]
            yield cell, [chunk for chunk in chunks if chunk is not None]

    def _learned(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.key / "learned.safetensors"

    def _trained(self, cell: Cell) -> Path:
        model = json.dumps(cell.identity["model"], sort_keys=True, separators=(",", ":"))
        return self.folder / "trained" / f"{hashlib.sha256(model.encode()).hexdigest()}.json"


def _hash(values: Tensor) -> str:
    about = f"{tuple(values.shape)} {values.dtype}".encode()
    return hashlib.sha256(about + values.numpy().tobytes()).hexdigest()


def _disjoint(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of the spans that start at the same row (a last chunk of fewer rows, and a whole one) the longest."""
    longest: dict[int, int] = {}
    for start, stop in spans:
        longest[start] = max(stop, longest.get(start, 0))
    return sorted(longest.items())


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """See :func:`robustbench_lite.files.replacing`; makes the folder too."""
    with replacing(path, "; what was finished before is kept") as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part


def _table(chunk: Chunk) -> NDArray[np.void]:
    """The columns as one array, which is read several times as fast as an array each; texts as wide as they are. A last
    column says of which rows there are images."""
    columns = {name: getattr(chunk, name) for name in chunk.columns()}
    columns["imaged"] = np.isin(chunk.row, chunk.imaged)
    for name, column in columns.items():
        if column.dtype.kind == "U":
            columns[name] = column.astype(f"U{max(1, int(np.char.str_len(column).max()))}")
    table = np.empty(len(chunk), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column
    return table


def _read(path: Path, kind: type[Chunk]) -> Chunk:
    with ZipFile(path) as file:
        if f"{_ROWS}.npy" not in file.namelist():
            raise ValueError(f"no {_ROWS}")
        table, images = (_array(file.read(f"{name}.npy")) for name in (_ROWS, "images"))
    imaged = table["row"][table["imaged"]]
    if len(imaged) != len(images):
        raise ValueError(f"{len(images)} images for {len(imaged)} inputs")
    return kind(**{name: table[name].copy() for name in kind.columns()}, imaged=imaged, images=images)


def _array(content: bytes) -> NDArray[Any]:
    """What a .npy file holds. Chunks have the same few headers, each of which takes as long to read as the rest."""
    size = int.from_bytes(content[8:10], "little") + 10
    dtype, shape = _header(content[:size])
    return np.frombuffer(content, dtype, offset=size).reshape(shape)


@lru_cache
def _header(content: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("its arrays are of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran or dtype.hasobject:
        raise ValueError("its arrays hold objects, or are in another order")
    return dtype, shape
