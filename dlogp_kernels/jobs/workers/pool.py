"""Tasks given to several workers, who may end at any moment: what one had is given to others."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import JobError
from .duty import Reply, Task

#: One that is computed, and one that waits, so that no worker has to.
_TASKS_OF_A_WORKER = 2
#: For one task, or one after another who end before they are ready: then it is no accident.
_MOST_LOST_WORKERS = 3


class WorkerLost(Exception):
    """A worker has ended; the message says how."""


class Worker(Protocol):
    """A process elsewhere that says when it is ready, and then computes what it is given, in that order."""

    def give(self, task: Task) -> None:
        """Give it a task, without waiting; nothing happens if the worker has ended."""

    def take(self) -> Reply:
        """What it says next, which `Wait` has found there; WorkerLost if it has ended."""

    def stop(self) -> None:
        """End it at once."""


@dataclass(eq=False)
class _Member:
    """A worker, and the tasks that it has, in order; it is given none before it is ready."""

    place: int
    worker: Worker
    ready: bool = False
    #: Workers in a row that ended here before they were ready.
    lost_before_ready: int = 0
    tasks: deque[Task] = field(default_factory=deque)


class Pool:
    """A team of workers, within whose context they live; one that ends has another in its place.

    Args:
        start: starts the worker of a place, counted from 0. That of place 0 says when it is ready what `greeting` is.
        number: of workers.
        wait: waits for some of the workers to have said something, or to have ended, and gives these.

    Entering raises JobError where workers end before they have what they need in memory, as `results` does where they
    end again and again on one task; and both raise what workers reply with.
    """

    def __init__(
        self,
        start: Callable[[int], Worker],
        number: int,
        wait: Callable[[Sequence[Worker]], Iterable[Worker]],
    ) -> None:
        self._start = start
        self._number = number
        self._wait = wait
        self._members: list[_Member] = []
        self._waiting: deque[Task] = deque()
        self._lost_at: Counter[tuple[int, ...]] = Counter()
        #: What worker 0 said when it was ready.
        self.greeting: Any = None

    def __enter__(self) -> "Pool":
        try:
            for place in range(self._number):
                self._members.append(_Member(place, self._start(place)))
            while not self._members[0].ready:
                for _ in self._heard():
                    raise AssertionError("nothing is given to workers before one is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.worker.stop()

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task once, with what a worker made of it."""
        left = iter(tasks)
        while self._hand_out(left):
            yield from self._heard()

    def _hand_out(self, left: Iterator[Task]) -> bool:
        """Give tasks to whoever is ready for some; whether there are any that are not done."""
        for member in self._members:
            while member.ready and len(member.tasks) < _TASKS_OF_A_WORKER and self._fetch(left):
                task = self._waiting.popleft()
                member.tasks.append(task)
                member.worker.give(task)
        return any(member.tasks for member in self._members) or self._fetch(left)

    def _fetch(self, left: Iterator[Task]) -> bool:
        """Whether there is a task to give; those that lost their worker come first."""
        if not self._waiting:
            self._waiting.extend(task for task in [next(left, None)] if task is not None)
        return bool(self._waiting)

    def _heard(self) -> Iterator[tuple[Task, Any]]:
        """Wait until there is something to hear; tasks that are done, with their values."""
        speaking = set(map(id, self._wait([member.worker for member in self._members])))
        for member in [member for member in self._members if id(member.worker) in speaking]:
            try:
                reply = member.worker.take()
            except WorkerLost as lost:
                self._replace(member, lost)
                continue
            for text in reply.warnings:
                warnings.warn(text, stacklevel=2)
            if reply.error is not None:
                raise reply.error
            if member.ready:
                yield member.tasks.popleft(), reply.value
            else:
                member.ready, member.lost_before_ready = True, 0
                if member.place == 0:
                    self.greeting = reply.value

    def _replace(self, member: _Member, lost: WorkerLost) -> None:
        """Start another worker, and let what the lost one had be given out again."""
        member.worker.stop()
        if not member.ready:
            member.lost_before_ready += 1
            if member.lost_before_ready == _MOST_LOST_WORKERS:
                raise JobError(f"workers end before they have the models in memory: {lost}") from lost
        elif member.tasks:
            # It was at the first.
            task = member.tasks[0]
            self._lost_at[task.key] += 1
            if self._lost_at[task.key] == _MOST_LOST_WORKERS:
                raise JobError(f"{task}: {_MOST_LOST_WORKERS} workers ended while they computed it: {lost}") from lost
        warnings.warn(f"a worker was lost: {lost}; another one goes on with what it had", stacklevel=2)
        self._waiting.extendleft(reversed(member.tasks))
        member.tasks.clear()
        member.worker, member.ready = self._start(member.place), False
