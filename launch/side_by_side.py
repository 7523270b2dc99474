"""Trainings side by side, each through a driver of its own: a cluster with room is used."""

from collections.abc import Callable
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Lock

from launch.ray_job import Jobs
from trainer.config import Config
from trainer.events import Event, Started


class SideBySide:
    """So many trainings at once, one for each thread that asks."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[Jobs] = SimpleQueue()
        self._all = [Jobs() for _ in range(count)]
        for jobs in self._all:
            self._free.put(jobs)
        self._starting = Lock()  # two that look for room at once would find the same
        self._stack = ExitStack()

    def __enter__(self) -> "SideBySide":
        for jobs in self._all:
            self._stack.enter_context(jobs)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self, config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> bool:
        """As `run_job`, and from several threads."""
        jobs = self._free.get()
        turn = _Turn(self._starting)

        def pass_on(event: Event) -> None:
            if isinstance(event, Started):  # it holds what it needs
                turn.end()
            on_event(event)

        try:
            return turn.begin(should_stop) and jobs.run(config, pass_on, should_stop)
        finally:
            turn.end()
            self._free.put(jobs)


class _Turn:
    """A lock that is given back once."""

    def __init__(self, lock: Lock) -> None:
        self._lock, self._held = lock, False

    def begin(self, should_stop: Callable[[], bool]) -> bool:
        """Whether it came before a wish to stop."""
        while not self._held and not should_stop():
            self._held = self._lock.acquire(timeout=0.2)
        return self._held

    def end(self) -> None:
        if self._held:
            self._held = False
            self._lock.release()
