"""Goodput: the share of the time since submission that went into steps that count.

A run's `starts.jsonl` has a line for every time that its workers began to step: who had submitted
them, at which step they went on, how many steps were lost, how long it took to be back, and which
code ran on what.
"""

import json
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from data_prep.files import write_whole
from trainer.config import CheckpointConfig
from trainer.provenance import commit
from trainer.run_folder import Line, RunFolder, add_line, read_lines

DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Submission:
    """A command that a person or a scheduler gave; it may start its workers many times."""

    name: str
    at: float  # seconds since 1970, by the clock of the machine that submitted it


class Goodput:
    """Counts one start of a run, on rank 0. Made before a lost run's lines are dropped."""

    def __init__(self, folder: RunFolder, submission: Submission, step: int, hardware: str) -> None:
        self._folder, self._submission, self._step = folder, submission, step
        self._provenance = {"commit": commit(), "hardware": hardware}
        lines, starts = read_lines(folder.metrics), read_lines(folder.starts)
        last = lines[-1] if lines else {}
        # a start before may have been lost when its lines were dropped, and no step was taken
        last = max([last, *read_lines(folder.behind)], key=lambda line: line.get("step", 0))
        if last.get("step", 0) > step:
            kept = {name: last.get(name, 0) for name in ("step", "elapsed_seconds")}
            write_whole(folder.behind, json.dumps(kept) + "\n")
        same = bool(starts) and starts[-1]["submission"] == submission.name
        self._lost_steps = max(0, last.get("step", 0) - step)
        self._useful = sum(line["step_seconds"] for line in taken(lines) if line["step"] <= step)
        # What passed between two submissions is nobody's: no machine was held.
        reached = last.get("elapsed_seconds", 0.0)
        self._base = starts[-1]["base_seconds"] if same else reached
        self._down_since = reached if same else self._base
        self._restarts = sum(start["restart"] for start in starts) + same
        self._same = same
        self._told = False

    def take_up(self, seconds: float, saved_at: float) -> None:
        """A step goes on that had taken so long when it was saved, at `saved_at` since 1970.

        Of another submission, that time is in no line yet.
        """
        if not self._same and saved_at < self._submission.at:
            self._base, self._down_since = self._base + seconds, self._down_since + seconds

    def elapsed(self) -> float:
        """Seconds since the run was submitted, without the time between submissions."""
        return self._base + max(0.0, time.time() - self._submission.at)

    def count(self, step_seconds: float, workers: int) -> Line:
        """What a step's metrics say of it; the first step of a start adds its line."""
        self._useful += step_seconds
        elapsed = self.elapsed()
        if not self._told:
            self._told = True
            self._folder.behind.unlink(missing_ok=True)
            record = {
                "submission": self._submission.name,
                "submitted": self._submission.at,
                "base_seconds": self._base,
                "step": self._step,
                "workers": workers,
                "restart": int(self._same),
                "lost_steps": self._lost_steps,
                # from the last step before to the end of the first after it
                "recovery_seconds": elapsed - self._down_since,
                **self._provenance,
            }
            add_line(self._folder.starts, record)
        return {
            "elapsed_seconds": elapsed,
            "goodput": min(1.0, self._useful / elapsed) if elapsed else 1.0,
            "restarts": self._restarts,
        }


def taken(lines: list[Line]) -> list[Line]:
    """Of lines of metrics.jsonl, from the first step on, those of steps that were not left out."""
    skipped = [0, *(line.get("skipped_steps", 0) for line in lines)]
    pairs = zip(lines, pairwise(skipped), strict=True)
    return [line for line, (before, after) in pairs if after == before]


class SaveSchedule:
    """When a checkpoint is due, and what the saves have cost."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._last = time.monotonic()
        self._costs: deque[float] = deque(maxlen=20)
        self._held_up = 0.0

    @property
    def interval_seconds(self) -> float:
        """Between two saves; endless where steps alone decide."""
        failures = self._config.failures_per_day
        if failures is None:
            return self._config.every_seconds or math.inf
        cost = statistics.median(self._costs or [1.0])  # until the first is measured
        return best_interval(Costs(cost, 0.0, failures))

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        return step % self._config.every == 0 or self.overdue()

    def overdue(self) -> bool:
        """Whether to save wherever that can be done: amid a step too."""
        return time.monotonic() - self._last >= self.interval_seconds

    def saved(self, seconds: float) -> None:
        """A save has held up the steps for so long."""
        self._last = time.monotonic()
        self._costs.append(seconds)
        self._held_up += seconds

    def take_held_up(self) -> float:
        """Seconds since the last call."""
        held_up, self._held_up = self._held_up, 0.0
        return held_up


@dataclass(frozen=True)
class Costs:
    """What failures and the defence against them cost a run, all in seconds but for the rate."""

    save_seconds: float  # that a save holds up the steps
    recovery_seconds: float  # from a failure to the first new step
    failures_per_day: float  # of all workers together

    @property
    def between_failures(self) -> float:
        return DAY_SECONDS / self.failures_per_day


def best_interval(costs: Costs) -> float:
    """Seconds between saves that lose least: too seldom loses steps, too often loses to saving.

    Failures at a constant rate. Source: J. T. Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps", FGCS 22 (2006), eq. 37.
    """
    save, mean = costs.save_seconds, costs.between_failures
    if save >= 2 * mean:
        return mean
    ratio = math.sqrt(save / (2 * mean))
    return max(1.0, math.sqrt(2 * save * mean) * (1 + ratio / 3 + ratio**2 / 9) - save)


def expected_goodput(costs: Costs, interval: float) -> float:
    """The share of time in steps that count, saving every `interval` seconds of stepping.

    A piece of interval + save seconds must pass without a failure; each failure before its end
    costs the time so far and a recovery. With rate r = 1 / mean, a piece takes
    exp(r recovery) (exp(r (interval + save)) - 1) / r on average. Source: as `best_interval`,
    eq. 13.
    """
    rate = 1 / costs.between_failures
    piece = math.expm1(rate * (interval + costs.save_seconds)) / rate
    return interval / (math.exp(rate * costs.recovery_seconds) * piece)


def describe(folder: RunFolder) -> dict[str, float] | None:
    """A finished run's goodput in numbers, None where there are none (an older run)."""
    lines, starts = read_lines(folder.metrics), read_lines(folder.starts)
    if not lines or "goodput" not in lines[-1]:
        return None
    recoveries = sorted(start["recovery_seconds"] for start in starts if start["restart"])
    return {
        "goodput": lines[-1]["goodput"],
        "elapsed_seconds": lines[-1]["elapsed_seconds"],
        "save_share": sum(line["save_seconds"] for line in lines)
        / (sum(line["step_seconds"] + line["save_seconds"] for line in lines) or 1.0),
        "restarts": len(recoveries),
        "lost_steps": sum(start["lost_steps"] for start in starts),
        "recovery_seconds": statistics.median(recoveries) if recoveries else 0.0,
        "worst_recovery_seconds": recoveries[-1] if recoveries else 0.0,
    }


def of_this_process() -> Submission:
    """Where no launcher has said who submitted: this process did, when it was started."""
    return Submission(f"process {time.time():.3f}", time.time())
