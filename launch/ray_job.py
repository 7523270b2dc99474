"""A training on Ray: a gang of workers that is started again, whatever of it was lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from glob import glob
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from launch.driver import Connected, GangEnd, Outcome, Refused
from launch.gang import LaunchError, NoRoom, no_cluster
from trainer.config import Config, LaunchConfig, load_config
from trainer.events import Event, Started, Stop, Warned
from trainer.goodput import Submission
from trainer.settings import ConfigError

CONNECT_SECONDS = 60  # for a Ray of our own to start, or a cluster to answer
START_DRIVER = "from launch.driver import main; main()"


def place_faults(paths: Iterable[tuple[str, str]], launch: LaunchConfig) -> list[str]:
    """What cannot work where the workers will be.

    GPUs that this machine has not, if it is this one; else relative paths, which mean nothing on
    other machines. `paths` are (key, value) of what the workers read and write.
    """
    if not os.environ.get("RAY_ADDRESS"):
        wanted, found = launch.workers * launch.gpus_per_worker, len(glob("/dev/nvidia[0-9]*"))
        each = f"{launch.gpus_per_worker:g} for each of {launch.workers} workers"
        gpus = f"launch.gpus_per_worker: {each}, but this machine has {found} GPUs: set 0 to train "
        return [f"{gpus}without, or RAY_ADDRESS to use a cluster's"] if wanted > found else []
    return [
        f"{key}: {value} is relative, but workers of a cluster start in other folders, which may "
        f"go: give an absolute path on storage that all of them share"
        for key, value in paths
        if "://" not in value and not Path(value).is_absolute()
    ]


def load_for_here(path: str, overrides: list[str]) -> Config:
    """A run's configuration, checked for where its workers will be. Raises ConfigError."""
    config = load_config(path, overrides)
    paths = [("run.dir", config.run.dir), *paths_of(config)]
    if faults := place_faults(paths, config.launch):
        raise ConfigError(path, faults)
    make_absolute(config)
    return config


def paths_of(config: Config) -> list[tuple[str, str]]:
    """(key, path) of all that every worker reads or writes, but for the run's own folder."""
    optional = {
        "checkpoint.remote": config.checkpoint.remote,
        "evaluate.path": config.evaluate.path,
        "data.cache": config.data.cache,
        "train.init_from": config.train.init_from,
    }
    data = [("data.path", path) for path in config.data.sources]
    return [*data, *((key, path) for key, path in optional.items() if path)]


def make_absolute(config: Config) -> None:
    """Workers may start in another folder of this machine."""
    config.run.dir = str(Path(config.run.dir).absolute())
    data, remote = config.data, config.checkpoint.remote
    if isinstance(data.path, dict):
        data.path = {_absolute(path): weight for path, weight in data.path.items()}
    else:
        data.path = _absolute(data.path)
    config.checkpoint.remote = remote and _absolute(remote)
    config.data.cache = config.data.cache and _absolute(config.data.cache)
    config.evaluate.path = config.evaluate.path and _absolute(config.evaluate.path)
    config.train.init_from = config.train.init_from and _absolute(config.train.init_from)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


def run_job(
    config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> bool:
    """Train `config` on Ray: a local one, or the cluster of RAY_ADDRESS. True when it finished.

    `on_event` sees what rank 0 reports; once `should_stop` is true the workers are asked to stop,
    which they do after a checkpoint. What is lost, workers, machines or Ray itself, is replaced, up
    to launch.max_failures times without a new checkpoint between. Raises LaunchError.
    """
    with Jobs() as jobs:
        return jobs.run(config, on_event, should_stop)


class Jobs:
    """Trainings one after another, on one Ray, which the first of them starts or joins."""

    def __init__(self) -> None:
        self._driver: _Driver | None = None
        self._launch: LaunchConfig | None = None  # what that Ray has room for

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def run(
        self, config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> bool:
        """As `run_job`."""
        if config.launch != self._launch:
            self._close()
            self._launch = config.launch
        submission = Submission(
            f"{socket.gethostname()}-{os.getpid()}-{time.time():.0f}", time.time()
        )
        tally = _Tally(config.launch.max_failures)

        def pass_on(event: Event) -> None:
            if isinstance(event, Started):
                tally.started_at(event.step, event.runs)
            on_event(event)

        while True:
            kind = LaunchError
            self._driver = self._driver or _Driver()
            end = self._driver.run(config, submission, pass_on, should_stop)
            if end is None:
                shown = f"Ray itself was lost ({self._driver.last_words()})"
                self._close()
            elif isinstance(end, Refused):
                shown, kind = end.message, NoRoom if end.no_room else LaunchError
                self._close()
                if not tally.failures:  # else what has failed may be on its way back
                    raise kind(shown)
            elif all(outcome.kind == "done" for outcome in end.outcomes):
                if not end.moved or end.finished or should_stop():
                    return end.finished
                on_event(Warned(f"{end.moved}: going on from the checkpoint just written"))
                continue
            else:
                shown = _first_cause(end)
            if should_stop():
                raise kind(f"{shown}: not started again, as it was asked to stop")
            tally.fail(shown, kind)
            again = f"starting all workers again from the last checkpoint ({tally})"
            on_event(Warned(f"{shown}: {again}"))

    def _close(self) -> None:
        if self._driver:
            self._driver.close()
        self._driver = None


class _Tally:
    """Counts failures without a new checkpoint between: over weeks there may be any number."""

    def __init__(self, limit: int) -> None:
        self.failures, self._limit = 0, limit
        self._reached = (-1, 0)

    def started_at(self, step: int, runs: int) -> None:
        """A checkpoint of that step, or amid the next."""
        if (step, runs) > self._reached:
            self.failures, self._reached = 0, (step, runs)

    def fail(self, shown: str, kind: type[LaunchError] = LaunchError) -> None:
        """Raises that kind of error where they are too many."""
        self.failures += 1
        if self.failures > self._limit:
            raise kind(
                f"{shown} (launch.max_failures {self._limit} restarts brought no new checkpoint)"
            )

    def __str__(self) -> str:
        return f"{self.failures} of {self._limit}"


class _Lost(Exception):
    """The driver's process does not answer any more."""


class _Driver:
    """The process that speaks with Ray, from here."""

    def __init__(self) -> None:
        self._connected = False
        self._pipe, theirs = Pipe()
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see close)
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START_DRIVER, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for the command, which asks
        )
        theirs.close()

    def run(
        self,
        config: Config,
        submission: Submission,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> GangEnd | Refused | None:
        """Run one gang to its end; None where the driver itself was lost."""
        asked = False
        deadline = time.monotonic() + CONNECT_SECONDS
        try:
            self._say((config, submission))
            while True:
                if not self._connected and (time.monotonic() > deadline or should_stop()):
                    self._process.send_signal(signal.SIGHUP)  # it would try for minutes
                    if should_stop():
                        return GangEnd()  # of which nothing had begun
                    waited = f"Ray did not answer within {CONNECT_SECONDS} s"
                    return Refused(no_cluster(waited) if "RAY_ADDRESS" in os.environ else waited)
                if should_stop() and not asked:
                    asked = True
                    self._say(Stop.NOW)
                message = self._hear()
                if isinstance(message, GangEnd | Refused):
                    return message
                if isinstance(message, Connected):
                    self._connected = True
                elif message is not None:
                    on_event(message)
        except _Lost:
            return None

    def _say(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise _Lost from None

    def _hear(self) -> Any:
        """What it says within a moment, if anything."""
        try:
            return self._pipe.recv() if self._pipe.poll(0.2) else None
        except (EOFError, OSError):
            raise _Lost from None

    def last_words(self) -> str:
        """Why it ended: by Python's word, or by Ray, which ends it when it is alone."""
        self._end(20)
        self._said.seek(0)
        errors = re.findall(r"^\w*Error: (.+)", self._said.read(), re.MULTILINE)
        return errors[-1] if errors else "its control service does not answer any more"

    def close(self) -> None:
        """End it, and all that it has started here."""
        self._pipe.close()
        self._end(20)
        self._said.close()

    def _end(self, seconds: float) -> None:
        """Wait until it ends, for so long."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGHUP)  # launch.reaper: all below it, now
            self._process.wait()


def _first_cause(end: GangEnd) -> str:
    """What happened first, by worker, machine and step: not what the others saw of it.

    Raises LaunchError where it is a fault of the run, which would come again.
    """
    by_kind = {
        kind: [outcome for outcome in end.outcomes if outcome.kind == kind]
        for kind in ("fault", "lost", "crash", "cut")
    }
    if by_kind["fault"]:
        raise LaunchError(_shared_message(by_kind["fault"]))
    causes = by_kind["lost"] or by_kind["crash"] or by_kind["cut"]
    return "; ".join(_where(outcome) for outcome in causes)


def _where(outcome: Outcome) -> str:
    if outcome.rank < 0:  # of none in particular
        return outcome.message
    return f"worker {outcome.rank} on {outcome.host} after step {outcome.step}: {outcome.message}"


def _shared_message(faults: list[Outcome]) -> str:
    """One message for all ranks that say the same."""
    messages: dict[str, list[int]] = {}
    for fault in faults:
        messages.setdefault(fault.message, []).append(fault.rank)
    return "\n".join(
        f"{message} (worker {', '.join(map(str, sorted(ranks)))})"
        for message, ranks in messages.items()
    )
