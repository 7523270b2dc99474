"""Trainings side by side, each through a driver of its own: a cluster with room is used."""

from collections.abc import Callable
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Condition, Lock

from launch.gang import NoRoom
from launch.ray_job import Jobs
from trainer.config import Config
from trainer.events import Event, Started, Warned

OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


class SideBySide:
    """So many trainings at once, one for each thread that asks, where there is room for them."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[Jobs] = SimpleQueue()
        self._all = [Jobs() for _ in range(count)]
        for jobs in self._all:
            self._free.put(jobs)
        self._starting = Lock()  # two that look for room at once would find the same
        self._changed = Condition()
        self._holding = self._ended = 0  # trainings that have room; that had
        self._stack = ExitStack()

    def __enter__(self) -> "SideBySide":
        for jobs in self._all:
            self._stack.enter_context(jobs)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, config: Config, on_event: OnEvent, should_stop: ShouldStop) -> bool:
        """As `run_job`, and from several threads: without room it waits for another's end."""
        jobs = self._free.get()
        try:
            while True:
                ended = self._ended
                try:
                    return self._try(jobs, config, on_event, should_stop)
                except NoRoom as error:
                    if self._ended == ended and not self._holding:
                        raise  # nobody here will make any
                    on_event(Warned(f"{error}: waiting for another training to end"))
                    with self._changed:
                        while self._ended == ended and not should_stop():
                            self._changed.wait(0.2)
        finally:
            self._free.put(jobs)

    def _try(self, jobs: Jobs, config: Config, on_event: OnEvent, should_stop: ShouldStop) -> bool:
        turn, holds = _Turn(self._starting), False

        def pass_on(event: Event) -> None:
            nonlocal holds
            if isinstance(event, Started) and not holds:
                holds = True
                self._count(1, 0)
                turn.end()
            on_event(event)

        try:
            return turn.begin(should_stop) and jobs.run(config, pass_on, should_stop)
        finally:
            turn.end()
            if holds:
                self._count(-1, 1)

    def _count(self, holding: int, ended: int) -> None:
        with self._changed:
            self._holding, self._ended = self._holding + holding, self._ended + ended
            self._changed.notify_all()


class _Turn:
    """A lock that is given back once."""

    def __init__(self, lock: Lock) -> None:
        self._lock, self._held = lock, False

    def begin(self, should_stop: ShouldStop) -> bool:
        """Whether it came before a wish to stop."""
        while not self._held and not should_stop():
            self._held = self._lock.acquire(timeout=0.2)
        return self._held

    def end(self) -> None:
        if self._held:
            self._held = False
            self._lock.release()
