"""One rank of a gang: a Ray actor that runs the trainer once, and the board where it is watched."""

import os
import socket
import threading
import traceback
from typing import Any

from launch.gang import Placed
from trainer.config import Config
from trainer.events import Event, Pulse, Stop
from trainer.goodput import Submission


class Board:
    """Where workers leave signs of life, rank 0 its events, and where it finds whether to stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pulses: dict[int, Pulse] = {}
        self.stop = Stop.NO

    def put(self, event: Event) -> Stop:
        self.events.append(event)
        return self.stop

    def beat(self, rank: int, pulse: Pulse) -> None:
        self.pulses[rank] = pulse

    def take(self, stop: Stop) -> tuple[list[Event], dict[int, Pulse]]:
        self.stop = stop or self.stop
        taken = self.events, self.pulses
        self.events, self.pulses = [], {}
        return taken


class Rank(Placed):
    """One rank that runs the trainer once."""

    def run(
        self, config: Config, environment: dict[str, str], board: Any, submission: Submission
    ) -> tuple[str, str]:
        """Train; ("done", "") or what went wrong. Exceptions are told as text, never pickled."""
        import ray

        pulse, ended = Pulse(), threading.Event()
        rank = int(environment["RANK"])

        def beat() -> None:
            while not ended.wait(0.5):
                board.beat.remote(rank, pulse)

        board.beat.remote(rank, pulse)
        threading.Thread(target=beat, daemon=True).start()
        os.environ.update(environment)
        try:
            import torch

            from trainer.guard import RunError
            from trainer.train import train
        except ImportError as error:  # of what is installed there
            ended.set()
            return "fault", f"{socket.gethostname()} cannot import what a run needs: {error}"
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        answer = None

        def report(event: Event) -> Stop:
            # The answer to the last event is taken, so that a step never waits for the board.
            nonlocal answer
            stop = ray.get(answer) if answer is not None else Stop.NO
            answer = board.put.remote(event)
            return stop

        try:
            train(config, report, pulse, submission)
        except (ValueError, RunError) as error:
            return "fault", str(error)
        except Exception as error:  # told to the driver, which decides for all workers
            return ("cut" if _lost_others(error) else "crash"), _told(error)
        finally:
            ended.set()
        if answer is not None:
            ray.get(answer)
        return "done", ""


def _lost_others(error: Exception) -> bool:
    """Whether a collective has failed: because of another worker, or of the network between."""
    import torch

    said = str(error)
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in said for word in ("gloo", "NCCL", "Connection closed by peer", "Timed out"))
    )


def _told(error: Exception) -> str:
    """One line where the project itself says what is wrong, else all that there is."""
    from trainer.guard import ReplicaError

    return str(error) if isinstance(error, ReplicaError) else traceback.format_exc()
