"""What rank 0 tells of a run, as it happens. Imports no torch: whoever watches needs none."""

from collections.abc import Callable
from dataclasses import dataclass

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
    shard_tokens: int
    scan: str  # the backend


@dataclass(frozen=True)
class Stepped:
    """A step was taken."""

    step: int
    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class Evaluated:
    """The held-out loss after a step, in nats per token."""

    step: int
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Warned:
    """Something that the person should know, and that the run survives."""

    message: str


@dataclass(frozen=True)
class Ended:
    """The start is over: finished where step is steps, else stopped in good order."""

    step: int
    steps: int


Event = Started | Stepped | Evaluated | Warned | Ended
Report = Callable[[Event], bool]  # the answer True asks to stop in good order


def silent(event: Event) -> bool:
    """A report to nobody."""
    return False
