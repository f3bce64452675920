"""Actors of a Ray cluster that work on tasks, one task each at a time; one that dies or takes too long is replaced."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from robustbench_lite.pool import Answer, Crew, Lost, Member, Task, Work, packed
from robustbench_lite.wording import one_line

LOCAL = "local"  # in place of an address: a cluster of this machine's processors, for as long as the run
PATIENCE = 10.0  # seconds until a cluster has to answer
STORE = 256 * 2**20  # bytes of shared memory that a local cluster takes


class Cluster(Crew[Task, Answer]):
    """At most ``size`` actors (0: as many as the cluster has room for), each with ``threads`` processors, or a GPU.

    ``address`` is that of a Ray cluster, or ``LOCAL``. Each actor calls ``begin`` with its number, for what it does;
    its machine needs this package, and the same files under the same names.

    Raises:
        ValueError: where Ray is not installed, or there is no such cluster; in ``with``.
    """

    def __init__(
        self, begin: Callable[[int], Work[Task, Answer]], address: str, size: int, threads: int, gpu: bool
    ) -> None:
        super().__init__(size)
        self._begin, self._address = packed(begin), address
        self._needs = {"num_cpus": 0 if gpu else threads, "num_gpus": int(gpu)}

    def __enter__(self) -> Cluster[Task, Answer]:
        try:
            import ray
        except ImportError:
            raise ValueError("--ray needs Ray: pip install 'robustbench-lite[ray]'") from None
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE}
        if self.size:
            local["num_cpus"] = self.size * max(1, self._needs["num_cpus"])
        try:
            _reach(self._address)
            if self._address == LOCAL:
                ray.init("local", **quiet, **local)
            else:
                ray.init(self._address, **quiet)
        except Exception as error:  # Ray raises anything
            raise ValueError(f"there is no Ray cluster at {self._address}: {one_line(error)}") from error
        there, kind = ray.cluster_resources(), "GPU" if self._needs["num_gpus"] else "CPU"
        room = int(there.get(kind, 0)) // max(self._needs.values())
        self.size = self.size or room
        if not room:
            ray.shutdown()
            raise ValueError(f"the Ray cluster has no room: a worker takes {max(self._needs.values())} {kind}")
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self._members.clear()

    def _hire(self, number: int, group: int) -> Member:
        return _Actor(number, group, self._begin, self._needs)

    def _listen(self, busy: Sequence[_Actor], seconds: float) -> Container[Member]:
        import ray

        heard, _ = ray.wait([actor.awaited for actor in busy], timeout=seconds)
        return [actor for actor in busy if actor.awaited in heard]


def _reach(address: str) -> None:
    """Sees that someone listens at HOST:PORT, for Ray itself asks for minutes before it gives up.

    Raises:
        OSError: where nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), PATIENCE).close()


class _Actor:
    """An actor, seen from the run that started it; ``task`` is what it works on, ``awaited`` its next word."""

    def __init__(self, number: int, group: int, begin: bytes, needs: dict[str, Any]) -> None:
        import ray

        self.number, self.group = number, group
        self.task: Any = None
        self.awaited: Any = None
        self.deadline, self._begun = float("inf"), False
        self._handle = ray.remote(_Bench).options(max_restarts=0, **needs).remote(begin, number)

    def take(self, task: Any) -> None:
        self.task, self._begun, self.deadline = task, False, float("inf")
        self.awaited = self._handle.prepare.remote(packed(task))

    def hear(self) -> Any:
        import ray

        try:
            said = ray.get(self.awaited)
        except ray.exceptions.RayActorError as error:
            return Lost(f"its actor died: {one_line(error, named=False)}", stopped=False)
        if said.wrong:
            raise ValueError(said.wrong)
        if self._begun:
            self.task = None
            return said.answer
        self._begun, self.awaited = True, self._handle.compute.remote()
        if self.task.seconds is not None:
            self.deadline = time.monotonic() + self.task.seconds
        return None

    def overdue(self) -> Lost | None:
        if self.deadline <= time.monotonic():
            return Lost(f"no answer within {self.task.seconds:g} s", stopped=True)
        return None

    def end(self) -> None:
        import ray

        ray.kill(self._handle)


@dataclass(frozen=True)
class _Said:
    """An actor's word: an answer, or what is ``wrong`` with what it was asked."""

    answer: Any = None
    wrong: str = ""


class _Bench:
    """What an actor is where it runs."""

    def __init__(self, begin: bytes, number: int) -> None:
        self._parcel, self._number = begin, number
        self._work: Any = None
        self._compute: Any = None

    def prepare(self, task: bytes) -> _Said:
        def set_up() -> None:
            self._work = self._work or pickle.loads(self._parcel)(self._number)
            self._compute = self._work(pickle.loads(task))

        return _say(set_up)

    def compute(self) -> _Said:
        return _say(self._compute)


def _say(call: Callable[[], Any]) -> _Said:
    try:
        return _Said(call())
    except ValueError as error:
        return _Said(wrong=one_line(error, named=False))
