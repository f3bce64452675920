"""Processes that work on tasks, one task each at a time; one that dies or takes too long is replaced."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any, Generic, Protocol, TypeVar, cast

from robustbench_lite.wording import one_line


class Limited(Protocol):
    """What a pool looks at in a task."""

    @property
    def seconds(self) -> float | None:
        """How long it may take."""

    @property
    def group(self) -> int:
        """A process works on tasks of one group only."""


Task = TypeVar("Task", bound=Limited)
Answer = TypeVar("Answer")
Work = Callable[[Task], Callable[[], Answer]]  # sets a task up; what that returns computes, and only that is timed

LOOK = 1.0  # seconds after which it is looked whether a process is still there that says nothing
READY, BEGAN, ANSWER, ERROR = "ready", "began", "answer", "error"
_SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit the locks of torch's threads, but not the threads


@dataclass(frozen=True)
class Lost:
    """In place of an answer: ``stopped`` at the end of its time, or its process died."""

    why: str
    stopped: bool


class Member(Protocol):
    """Who works on tasks for a :class:`Crew`; ``task`` is what it works on, until ``deadline``."""

    number: int
    group: int
    task: Any
    deadline: float

    def take(self, task: Any) -> None: ...

    def hear(self) -> Any:
        """Takes its next word; the answer to the task, or that it is lost, or None where that is still to come."""

    def overdue(self) -> Lost | None:
        """That the task is lost, where its time is over or its member is gone without a word."""

    def end(self) -> None: ...


class Crew(ABC, Generic[Task, Answer]):
    """At most ``size`` members, hired when there is work; one that loses its task is replaced."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[Member] = []

    @abstractmethod
    def _hire(self, number: int, group: int) -> Member: ...

    @abstractmethod
    def _listen(self, busy: Sequence[Any], seconds: float) -> Container[Member]:
        """Waits for that long at most; who of ``busy`` has something to say."""

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer | Lost]]:
        """Each task with what became of it, in the order in which they end; a task is taken when a member is free.

        Raises:
            ValueError: where a member says that what it was asked is wrong, or cannot begin.
        """
        left = iter(tasks)
        coming = next(left, None)
        while coming is not None or any(member.task for member in self._members):
            while coming is not None and (member := self._free(coming.group)):
                member.take(coming)
                coming = next(left, None)
            yield from self._gather()

    def _free(self, group: int) -> Member | None:
        idle = [member for member in self._members if member.task is None]
        for member in idle:
            if member.group == group:
                return member
        if idle and len(self._members) == self.size:
            self._dismiss(idle[0])
        if len(self._members) == self.size:
            return None
        numbers = {member.number for member in self._members}
        self._members.append(self._hire(min(set(range(self.size)) - numbers), group))
        return self._members[-1]

    def _gather(self) -> Iterator[tuple[Task, Answer | Lost]]:
        """Waits for news, and says what has ended."""
        busy = [member for member in self._members if member.task is not None]
        nearest = min((member.deadline for member in busy), default=float("inf"))
        heard = self._listen(busy, max(0.0, min(LOOK, nearest - time.monotonic())))
        for member in busy:
            task = member.task
            ended = member.hear() if member in heard else member.overdue()
            if ended is not None:
                if isinstance(ended, Lost):
                    self._dismiss(member)
                yield task, ended

    def _dismiss(self, member: Member) -> None:
        member.end()
        self._members.remove(member)


class Pool(Crew[Task, Answer]):
    """Processes of this machine; each calls ``begin`` with its number, for what it does.

    As a context it leaves no process behind.
    """

    def __init__(self, begin: Callable[[int], Work[Task, Answer]], size: int) -> None:
        super().__init__(size)
        self._begin = packed(begin)

    def __enter__(self) -> Pool[Task, Answer]:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.end()
        self._members.clear()

    def _hire(self, number: int, group: int) -> Member:
        with _undisturbed():
            return _Worker(number, group, self._begin)

    def _listen(self, busy: Sequence[_Worker], seconds: float) -> Container[Member]:
        owners = {worker.connection: worker for worker in busy}
        return [owners[cast(Any, one)] for one in connection.wait(list(owners), seconds)]


class _Worker:
    """A process, seen from the one that started it; ``task`` is what it works on, or will once it is ready."""

    def __init__(self, number: int, group: int, begin: bytes) -> None:
        self.number, self.group = number, group
        self.task: Any = None
        self.deadline = float("inf")
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, number), name=f"worker {number}")
        self.process.start()
        theirs.close()
        self._parcels, self._begun, self._ready = deque([begin]), False, False

    def take(self, task: Limited) -> None:
        self._parcels.append(packed(task))
        self.task = task
        self._send()

    def hear(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            return self._died()
        if kind == READY:
            self._ready = True
            self._send()
        elif kind == BEGAN and self.task.seconds is not None:
            self.deadline = time.monotonic() + self.task.seconds
        elif kind == ERROR:
            raise value
        elif kind == ANSWER:
            self.task, self.deadline = None, float("inf")
            return value
        return None

    def overdue(self) -> Lost | None:
        if not self.process.is_alive() and not self.connection.poll():
            return self._died()
        if self.deadline <= time.monotonic():
            return Lost(f"no answer within {self.task.seconds:g} s", stopped=True)
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _send(self) -> None:
        """The next parcel, once the process is ready for it: it never waits for a reader."""
        if self._ready and self._parcels:
            self._ready = False
            try:
                self.connection.send_bytes(self._parcels.popleft())
            except OSError:
                return  # it has just died, as will be heard
            self._begun = True

    def _died(self) -> Lost:
        self.process.join(LOOK)
        code = self.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        if not self._begun:
            raise ValueError(
                f"a worker process could not begin ({how}); a script that asks for workers wants "
                "its calls below: if __name__ == '__main__'"
            )
        return Lost(f"its process ended with {how}", stopped=False)


def packed(thing: object) -> bytes:
    """Ready to be sent to a process.

    Raises:
        ValueError: for what cannot be pickled, such as a class or a function that is made within a function.
    """
    try:
        return pickle.dumps(thing)
    except Exception as error:  # whatever an object's own pickling raises
        raise ValueError(f"worker processes cannot be handed what cannot be pickled: {one_line(error)}") from error


def _serve(parent: connection.Connection[Any, Any], number: int) -> None:
    """What a process does, until it is killed."""
    threading.Thread(target=_follow_parent, daemon=True).start()

    def parcel() -> Any:
        parent.send((READY, None))
        content = parent.recv_bytes()
        try:
            return pickle.loads(content)
        except Exception as error:  # whatever an import raises
            raise ValueError(f"a worker process cannot load what it was handed: {one_line(error)}") from error

    try:
        work = parcel()(number)
        while True:
            compute = work(parcel())
            parent.send((BEGAN, None))
            parent.send((ANSWER, compute()))
    except (EOFError, BrokenPipeError):
        return
    except ValueError as error:
        parent.send((ERROR, ValueError(one_line(error, named=False))))
    except Exception:
        parent.send((ERROR, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C, which a terminal tells every process, is kept from those that are started here."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started later, it would end this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
