"""What rank 0 tells of a run, as it happens. Imports no torch: whoever watches needs none."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

Metrics = dict[str, float | None]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Started:
    """A start, the first or after a stop: at `step` of `steps`."""

    step: int
    steps: int
    parameters: int
    workers: int
    dp: int
    sp: int
    shard_tokens: int  # of the sequence, or of each of its segments
    segments: int
    expected_bytes: int  # of a worker's memory, in a step
    scan: str  # the backend
    changed: tuple[str, ...] = ()  # settings that are not those of the last start
    runs: int = 0  # of a segment, done for the next step by an earlier start


@dataclass(frozen=True)
class Stepped:
    """A step was taken."""

    step: int
    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class Streamed:
    """A step on the way: of `of` runs of a segment `run` are done, in `seconds`."""

    step: int  # that is being taken
    run: int
    of: int
    seconds: float
    share: float  # of the step's work, above 0: the way back is about three times the way there

    def __str__(self) -> str:
        left = self.seconds / self.share * (1 - self.share)
        return f"step {self.step}: segment {self.run:,} of {self.of:,}, {left:,.0f} s left"


@dataclass(frozen=True)
class Evaluated:
    """The held-out loss after a step, in nats per token; of actions, their squared error."""

    step: int
    loss: float
    bits_per_byte: float | None  # of text
    accuracy: float | None  # None of actions

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"held-out squared error {self.loss:.4f}"
        told = f"held-out loss {self.loss:.4f} nats"
        if self.bits_per_byte is None:
            return f"{told}, {self.accuracy:.1%} of the answers right"
        return f"{told}, {self.bits_per_byte:.4f} bits per byte"


@dataclass(frozen=True)
class Warned:
    """Something that the person should know, and that the run survives."""

    message: str


@dataclass(frozen=True)
class Ended:
    """The start is over: finished where step is steps, else stopped in good order."""

    step: int
    steps: int


class Stop(IntEnum):
    """What whoever watches asks of a run: to go on, or to stop in good order."""

    NO = 0
    NOW = 1  # after the next step, or segment of a streamed one, and a checkpoint
    AT_CHECKPOINT = 2  # after the next checkpoint that is due anyway


Event = Started | Stepped | Streamed | Evaluated | Warned | Ended
Report = Callable[[Event], Stop]


class Stopped(Exception):
    """A stop amid a streamed step, which is saved as far as it is."""


def silent(event: Event) -> Stop:
    """A report to nobody."""
    return Stop.NO


@dataclass
class Pulse:
    """What a worker does just now: written by the run, read beside it by whoever watches it."""

    step: int = 0  # steps taken
    doing: str = "starting"
    since: float = 0.0  # time.monotonic()

    def now(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()
