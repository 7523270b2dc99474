"""The process that speaks with Ray: it starts a gang when asked, and follows it to its end.

It stands between a person's command and Ray, because Ray ends its driver without a word when its
control service is lost; the command (launch.ray_job) sees that, and starts another. Below it, and
below `launch.reaper`, is everything that a Ray of our own starts.
"""

import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from launch.gang import (
    LaunchError,
    NoRoom,
    check_own_ray,
    connect,
    draining,
    environments,
    find_room,
    gang,
    rooms,
)
from launch.placement import Plan, plan
from launch.rank import Board, Rank
from launch.reaper import run_below
from trainer.config import Config
from trainer.events import Ended, Event, Pulse, Stop, Warned
from trainer.goodput import Submission

LOOK_SECONDS = 2.0  # between looks at the cluster: who leaves, and whether there is more room


@dataclass(frozen=True)
class Outcome:
    """How one worker ended.

    `kind` is done, fault (of the run: starting again would not help), crash, cut (it lost another
    worker, and is not the cause) or lost (its process, or all signs of its life).
    """

    rank: int
    kind: str
    message: str = ""
    host: str = ""
    step: int = 0


@dataclass
class GangEnd:
    """How a gang ended: all outcomes that came; whether the run is finished; why it was stopped."""

    outcomes: list[Outcome] = field(default_factory=list)
    finished: bool = False
    moved: str = ""  # stopped in good order to go on elsewhere


@dataclass(frozen=True)
class Refused:
    """No gang: what a LaunchError says."""

    message: str
    no_room: bool = False  # now


@dataclass(frozen=True)
class Connected:
    """There is a Ray to speak with."""


class Seen:
    """What is known of a worker while it runs."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.pulse = Pulse()
        self.at = time.monotonic()  # when it came; nothing is due before the first

    def silent_seconds(self) -> float:
        return time.monotonic() - self.at


def serve(pipe: Connection) -> None:
    """Answer requests of the command until it closes the pipe."""
    config, submission = _request(pipe)
    try:
        connect(config)
    except LaunchError as error:
        pipe.send(Refused(str(error)))
        return
    pipe.send(Connected())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray would end here; the command asks
    import ray

    try:
        while True:
            _Gang(config, submission, pipe).run()
            config, submission = _request(pipe)
    except EOFError:
        return
    finally:
        ray.shutdown()


def _request(pipe: Connection) -> tuple[Config, Submission]:
    while isinstance(message := pipe.recv(), Stop):  # of a gang that had ended already
        pass
    return message


class _Gang:
    """One gang, from room for it to its end."""

    def __init__(self, config: Config, submission: Submission, pipe: Connection) -> None:
        self.config, self.submission, self.pipe = config, submission, pipe
        self.end = GangEnd()
        self.stop = Stop.NO
        self.seen: list[Seen] = []

    def run(self) -> None:
        import ray

        try:
            planned = find_room(
                self.config, lambda line: self.pipe.send(Warned(line)), lambda: bool(self._wish())
            )
            if planned:
                self._start(planned)
        except LaunchError as error:
            self.pipe.send(Refused(str(error), isinstance(error, NoRoom)))
            return
        except ray.exceptions.RayError as error:  # lost before or beside its run
            reason = f"a machine or a worker was lost ({type(error).__name__})"
            self.end.outcomes.append(Outcome(-1, "lost", reason))
        self.pipe.send(self.end)

    def _start(self, planned: Plan) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        config = planned.applied(self.config)
        if planned.workers < self.config.launch.workers:
            room = f"room for {planned.workers} of {self.config.launch.workers} workers"
            self.pipe.send(Warned(f"{room}: going on with these, sp={planned.sp}"))
        try:
            with gang(config, Rank, planned.nodes) as (workers, places):
                settings = environments(places, config.launch.cpus_per_worker)
                self.seen = [Seen(place.host) for place in places]
                running = {
                    worker.run.remote(config, environment, board, self.submission): rank
                    for rank, (worker, environment) in enumerate(
                        zip(workers, settings, strict=True)
                    )
                }
                self._follow(running, board, planned)
        finally:
            ray.kill(board)

    def _follow(self, running: dict[Any, int], board: Any, planned: Plan) -> None:
        """Pass events on until every worker has ended, or shortly after the first has failed."""
        import ray

        failed_at: float | None = None
        looked_at = time.monotonic()
        while running and not self._over(failed_at):
            done, _ = ray.wait(list(running), timeout=0.1)
            self._take(ray.get(board.take.remote(self._wish()), timeout=30))
            for reference in done:
                self.end.outcomes.append(self._outcome(reference, running.pop(reference)))
            for reference, rank in list(running.items()):
                if self.seen[rank].silent_seconds() > self.config.launch.silence_seconds:
                    del running[reference]
                    self.end.outcomes.append(self._silent(rank))
            if any(outcome.kind != "done" for outcome in self.end.outcomes):
                failed_at = failed_at or time.monotonic()
            elif time.monotonic() - looked_at > LOOK_SECONDS:
                looked_at = time.monotonic()
                self._look_around(planned)
        self._take(ray.get(board.take.remote(Stop.NO), timeout=30))
        if failed_at:
            self._name_who_hangs(running)

    def _over(self, failed_at: float | None) -> bool:
        """Whether the cause is known, or was waited for long enough."""
        if failed_at is None:
            return False
        known = any(outcome.kind in ("lost", "crash") for outcome in self.end.outcomes)
        return time.monotonic() - failed_at > (0.3 if known else 2.0)

    def _wish(self) -> Stop:
        """What is asked of the workers, by the command or by the cluster."""
        while self.pipe.poll():
            self.stop, self.end.moved = self.pipe.recv(), ""
        return self.stop

    def _look_around(self, planned: Plan) -> None:
        """Leave a machine that is to be taken away; take more workers where there is room."""
        check_own_ray()
        if self.stop == Stop.NOW:
            return
        if leaving := draining() & set(planned.nodes):
            self.end.moved = f"machine {min(leaving)[:8]} is to be taken away"
            self.stop = Stop.NOW
        elif not self.stop and planned.workers < self.config.launch.workers:
            free = rooms(self.config)
            for node in planned.nodes:
                free[node] = free.get(node, 0) + 1
            larger = plan(self.config, free)
            if larger and larger.workers > planned.workers:
                self.end.moved = f"there is room for {larger.workers} workers"
                self.stop = Stop.AT_CHECKPOINT

    def _take(self, taken: tuple[list[Event], dict[int, Pulse]]) -> None:
        events, pulses = taken
        for rank, pulse in pulses.items():
            self.seen[rank].pulse, self.seen[rank].at = pulse, time.monotonic()
        for event in events:
            self.end.finished |= isinstance(event, Ended) and event.step == event.steps
            self.pipe.send(event)

    def _outcome(self, reference: Any, rank: int) -> Outcome:
        import ray

        seen = self.seen[rank]
        try:
            kind, message = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # it lives, and what it ran has raised
            kind, message = "crash", str(error)
        except ray.exceptions.RayError as error:
            kind = "lost"
            message = f"its process was lost ({type(error).__name__}) while {seen.pulse.doing}"
        return Outcome(rank, kind, message, seen.host, seen.pulse.step)

    def _silent(self, rank: int) -> Outcome:
        seen = self.seen[rank]
        message = (
            f"gave no sign of life for launch.silence_seconds "
            f"{self.config.launch.silence_seconds:g} while {seen.pulse.doing}"
        )
        return Outcome(rank, "lost", message, seen.host, seen.pulse.step)

    def _name_who_hangs(self, running: dict[Any, int]) -> None:
        """Where all that failed were only cut off, the cause is with those that did not answer."""
        if any(outcome.kind != "cut" for outcome in self.end.outcomes if outcome.kind != "done"):
            return
        waited = f"parallel.timeout_seconds {self.config.parallel.timeout_seconds:g}"
        for rank in running.values():
            seen = self.seen[rank]
            message = f"did not answer for {waited}, while {seen.pulse.doing}"
            self.end.outcomes.append(Outcome(rank, "lost", message, seen.host, seen.pulse.step))


def main() -> None:
    """What a command starts, with the number of its pipe's other end."""
    handle = int(sys.argv[1])
    run_below(lambda: serve(Connection(handle)))
