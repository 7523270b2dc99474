"""Trainings side by side: as many at once as there are lanes, one at a time looking for room."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event as Flag

import pytest

from launch import side_by_side
from launch.gang import LaunchError, NoRoom
from launch.side_by_side import SideBySide
from trainer.config import Config
from trainer.events import Event, Started


class FakeJobs:
    """Runs that begin and end when a test says so, by the steps that name them."""

    begun: dict[int, Flag]
    end: dict[int, Flag]
    looking: int  # for room, now
    most: int

    def __enter__(self) -> "FakeJobs":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, config: Config, on_event: Callable[[Event], None], should_stop: object) -> bool:
        name = config.train.steps
        FakeJobs.looking += 1
        FakeJobs.most = max(FakeJobs.most, FakeJobs.looking)
        time.sleep(0.02)
        FakeJobs.looking -= 1
        if name == 3:
            raise LaunchError("it failed")
        if name == 5 and not FakeJobs.end[5].is_set():
            raise NoRoom("there is no room")
        on_event(Started(0, name, 1, 1, 1, 1, 1, 1, 1, "native"))
        FakeJobs.begun[name].set()
        assert FakeJobs.end[name].wait(10)
        return True


@pytest.fixture
def jobs(monkeypatch) -> Iterator[type[FakeJobs]]:
    FakeJobs.begun, FakeJobs.end = ({n: Flag() for n in range(1, 6)} for _ in range(2))
    FakeJobs.looking = FakeJobs.most = 0
    monkeypatch.setattr(side_by_side, "Jobs", FakeJobs)
    yield FakeJobs
    for flag in FakeJobs.end.values():
        flag.set()


def _config(name: int) -> Config:
    config = Config()
    config.train.steps = name
    return config


def test_as_many_run_at_once_as_there_are_lanes_and_one_at_a_time_begins(jobs):
    with SideBySide(2) as trainings, ThreadPoolExecutor(4) as pool:

        def go(name: int) -> bool:
            return trainings.run(_config(name), lambda _: None, lambda: False)

        running = {name: pool.submit(go, name) for name in (1, 2)}
        assert all(jobs.begun[name].wait(10) for name in (1, 2))  # both, and neither at its end
        running[4] = pool.submit(go, 4)
        assert not jobs.begun[4].wait(0.2)
        jobs.end[1].set()
        assert jobs.begun[4].wait(10)
        for flag in jobs.end.values():
            flag.set()
        assert [each.result(10) for each in running.values()] == [True] * 3
        assert jobs.most == 1


def test_one_that_does_not_begin_lets_the_next_one_begin(jobs):
    jobs.end[1].set()
    with SideBySide(2) as trainings:
        for _ in range(3):
            with pytest.raises(LaunchError, match="it failed"):
                trainings.run(_config(3), lambda _: None, lambda: False)
        assert trainings.run(_config(1), lambda _: None, lambda: False)


def test_a_stop_is_heard_by_one_that_waits_for_its_turn(jobs, monkeypatch):
    asked = Flag()
    with SideBySide(2) as trainings, ThreadPoolExecutor(2) as pool:
        trainings._starting.acquire()  # another looks for room, for hours
        waiting = pool.submit(trainings.run, _config(1), lambda _: None, asked.is_set)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        asked.set()
        assert waiting.result(10) is False
    assert not jobs.begun[1].is_set()


def test_without_room_it_waits_for_another_to_end(jobs):
    """And is lost where no other training has any."""
    told: list[Event] = []
    with SideBySide(2) as trainings, ThreadPoolExecutor(2) as pool:
        with pytest.raises(NoRoom):
            trainings.run(_config(5), told.append, lambda: False)
        first = pool.submit(trainings.run, _config(1), lambda _: None, lambda: False)
        assert jobs.begun[1].wait(10)
        second = pool.submit(trainings.run, _config(5), told.append, lambda: False)
        with pytest.raises(TimeoutError):
            second.result(0.5)
        jobs.end[5].set()
        jobs.end[1].set()
        assert first.result(10)
        assert second.result(10)
    assert ["waiting for another training to end" in str(each) for each in told] == [True, False]
