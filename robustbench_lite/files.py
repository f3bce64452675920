"""Files that are there as a whole or not at all."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, kept: str = "") -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it is written, and is gone if it never is; no other process, on
    whatever machine, has one of that name.

    Raises:
        ValueError: where it cannot be written; ends with what is ``kept``.
    """
    part = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):
            part.unlink()
