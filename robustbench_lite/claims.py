"""Which run computes what, where several share a results folder: a file beside the result, kept fresh by its maker."""

import os
import socket
import threading
import time
from pathlib import Path

BEAT, PATIENCE = 5.0, 60.0  # seconds between two signs of life, and without one until a claim counts for nothing


class Claims:
    """The claims of one run; as a context it gives them all back.

    They only save work. Where two runs compute the same after all, each replaces the file by an equal one.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._owner = f"{socket.gethostname()} {os.getpid()}"
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[int, float]] = {}  # of others: the last sign of life, and when it was new here
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._heart.join()
        for claim in [*self._held]:
            self._drop(claim)

    def take(self, path: Path) -> bool:
        """Claims what is to become the file ``path``, unless another run has claimed it and lives.

        Raises:
            ValueError: where no file can be written there.
        """
        claim = path.with_suffix(".claim")
        try:
            claim.parent.mkdir(parents=True, exist_ok=True)
            if claim.exists() and self._stale(claim):
                claim.unlink(missing_ok=True)
            with claim.open("x") as file:
                file.write(self._owner)
        except FileExistsError:
            return False
        except OSError as error:
            raise ValueError(
                f"cannot write {claim}: {error.strerror or error}; what was finished before is kept"
            ) from error
        self._held.add(claim)
        return True

    def give_back(self, path: Path) -> None:
        claim = path.with_suffix(".claim")
        if claim in self._held:
            self._drop(claim)

    def _drop(self, claim: Path) -> None:
        self._held.discard(claim)
        claim.unlink(missing_ok=True)

    def _stale(self, claim: Path) -> bool:
        """Whether who made a claim is gone: a process of this machine, or one that gave no sign of life for long.

        Ages are taken by this run's own clock, from when it first saw the sign: clocks of machines differ.
        """
        try:
            owner, sign, now = claim.read_text(), claim.stat().st_mtime_ns, time.monotonic()
        except FileNotFoundError:
            return False
        host, _, process = owner.rpartition(" ")
        if host == socket.gethostname() and process.isdigit() and not _alive(int(process)):
            return True
        if self._seen.get(claim, (None, now))[0] != sign:
            self._seen[claim] = sign, now
        return now - self._seen[claim][1] > self.patience

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            for claim in [*self._held]:
                try:
                    os.utime(claim)
                except OSError:
                    continue


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True  # there, to ask is to kill
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
