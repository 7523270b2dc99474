"""A training on Ray: a gang of workers that run the trainer and may be restarted."""

import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.gang import LaunchError, Placed, connect, environments, gang
from trainer.config import Config
from trainer.events import Ended, Event, Warned


@dataclass(frozen=True)
class Outcome:
    """How one worker ended: in good order, with a fault of the run, a crash, or lost altogether."""

    rank: int
    kind: str  # done, fault, crash, lost
    message: str = ""


def place_faults(paths: Iterable[tuple[str, str]]) -> list[str]:
    """What cannot work where the workers will be: relative paths mean nothing on other machines.

    `paths` are (key, value) of what the workers read and write.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return []
    return [
        f"{key}: {value} is relative, but workers of a cluster start in folders of their own that "
        f"are deleted: give an absolute path on storage that all of them share"
        for key, value in paths
        if "://" not in value and not Path(value).is_absolute()
    ]


def make_absolute(config: Config) -> None:
    """Workers may start in another folder of this machine."""
    config.run.dir = str(Path(config.run.dir).absolute())
    if "://" not in config.data.path:
        config.data.path = str(Path(config.data.path).absolute())


def run_job(
    config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> bool:
    """Train `config` on Ray: a local one, or the cluster of RAY_ADDRESS. True when it finished.

    `on_event` sees what rank 0 reports; once `should_stop` is true the workers are asked to stop,
    which they do after a checkpoint. Lost workers are replaced up to launch.max_failures times.
    Raises LaunchError.
    """
    connect(config)
    import ray

    try:
        failures = 0
        while True:
            try:
                outcomes, finished = _run_gang(config, on_event, should_stop)
            except ray.exceptions.RayError as error:  # lost before or beside its run
                lost_early = f"a worker was lost ({type(error).__name__})"
                outcomes, finished = [Outcome(0, "lost", lost_early)], False
            faults = [o for o in outcomes if o.kind == "fault"]
            if faults:
                raise LaunchError(_shared_message(faults))
            if all(o.kind == "done" for o in outcomes):
                return finished
            lost = [o for o in outcomes if o.kind == "lost"] or _silent(outcomes, config)
            shown = "; ".join(
                f"worker {o.rank}: {o.message}" for o in lost or outcomes if o.message
            )
            if not lost:
                raise LaunchError(f"the workers failed\n{shown}")
            failures += 1
            if failures > config.launch.max_failures:
                raise LaunchError(f"{shown} (restart {failures - 1} was the last allowed)")
            count = f"{failures} of {config.launch.max_failures}"
            again = f"starting all workers again from the last checkpoint ({count})"
            on_event(Warned(f"{shown}: {again}"))
    finally:
        ray.shutdown()


def _shared_message(faults: list[Outcome]) -> str:
    """One message for all ranks that say the same."""
    messages: dict[str, list[int]] = {}
    for fault in faults:
        messages.setdefault(fault.message, []).append(fault.rank)
    return "\n".join(
        f"{message} (worker {', '.join(map(str, sorted(ranks)))})"
        for message, ranks in messages.items()
    )


def _silent(outcomes: list[Outcome], config: Config) -> list[Outcome]:
    """The workers that the others waited for in vain: alive, perhaps, but hung."""
    if not any("timed out" in o.message.lower() for o in outcomes):
        return []
    answered = {o.rank for o in outcomes}
    waited = f"did not answer for parallel.timeout_seconds {config.parallel.timeout_seconds:g}"
    return [
        Outcome(rank, "lost", waited)
        for rank in range(config.launch.workers)
        if rank not in answered
    ]


def _run_gang(
    config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> tuple[list[Outcome], bool]:
    """Start all workers, follow them to their end, and leave none behind."""
    import ray

    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    try:
        with gang(config, _Worker) as (workers, places):
            settings = environments(places, config.launch.cpus_per_worker)
            running = {
                worker.run.remote(config, environment, board): rank
                for rank, (worker, environment) in enumerate(zip(workers, settings, strict=True))
            }
            return _follow(running, board, on_event, should_stop)
    finally:
        ray.kill(board)


def _follow(
    running: dict[Any, int],
    board: Any,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> tuple[list[Outcome], bool]:
    """Pass events on until every worker has ended, or 3 s after the first that failed."""
    import ray

    outcomes: list[Outcome] = []
    finished = False
    failed_at = None
    while running and (failed_at is None or time.monotonic() - failed_at < 3):
        done, _ = ray.wait(list(running), timeout=0.2)
        events = ray.get(board.take.remote(should_stop()))
        for reference in done:
            outcome = _outcome(reference, running.pop(reference))
            outcomes.append(outcome)
            if outcome.kind != "done":
                failed_at = failed_at or time.monotonic()
        for event in events:
            finished |= isinstance(event, Ended) and event.step == event.steps
            on_event(event)
    for event in ray.get(board.take.remote(False)):
        finished |= isinstance(event, Ended) and event.step == event.steps
        on_event(event)
    return outcomes, finished


def _outcome(reference: Any, rank: int) -> Outcome:
    import ray

    try:
        kind, message = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(rank, "lost", f"its process was lost ({type(error).__name__})")
    return Outcome(rank, kind, message)


class _Board:
    """Where rank 0 leaves its events and finds whether to stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stop = False

    def put(self, event: Event) -> bool:
        self.events.append(event)
        return self.stop

    def take(self, stop: bool) -> list[Event]:
        self.stop |= stop
        events, self.events = self.events, []
        return events


class _Worker(Placed):
    """One rank that runs the trainer once."""

    def run(self, config: Config, environment: dict[str, str], board: Any) -> tuple[str, str]:
        """Train; ("done", "") or what went wrong. Exceptions are told as text, never pickled."""
        import ray

        os.environ.update(environment)
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        from trainer.train import RunError, train

        answer = None

        def report(event: Event) -> bool:
            # The answer to the last event is taken, so that a step never waits for the board.
            nonlocal answer
            stop = bool(ray.get(answer)) if answer is not None else False
            answer = board.put.remote(event)
            return stop

        try:
            train(config, report)
        except (ValueError, RunError) as error:
            return "fault", str(error)
        except Exception:  # told to the driver, which decides for all workers
            return "crash", traceback.format_exc()
        if answer is not None:
            ray.get(answer)
        return "done", ""
