"""A worker under torchrun: torchrun --nproc-per-node 4 -m trainer CONFIG [key=value ...]."""

import math
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from types import FrameType

from trainer.config import load_config
from trainer.events import Ended, Evaluated, Event, Started, Stepped, Stop, Streamed, Warned
from trainer.settings import ConfigError


def main(argv: list[str]) -> int:
    """Train as one of WORLD_SIZE workers; 0 when the run ended in good order."""
    if not argv or argv[0].startswith("-"):
        print("usage: torchrun --nproc-per-node N -m trainer CONFIG.yaml [key=value ...]")
        return 2
    rank = int(os.environ.get("RANK", 0))
    try:
        config = load_config(argv[0], argv[1:], workers=int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        if rank == 0:  # every rank found the same
            print(f"error: {error}", file=sys.stderr)
        return 1

    stopping = False

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGUSR1, ask_to_stop)  # some schedulers' notice

    started = time.monotonic()
    limit = config.run.max_seconds or math.inf

    def report(event: Event) -> Stop:
        print(_line(event), flush=True)
        return Stop.NOW if stopping or time.monotonic() - started > limit else Stop.NO

    # imports torch, so after the configuration is good
    from trainer.guard import ReplicaError, RunError
    from trainer.train import train

    try:
        train(config, report)
    except (ValueError, RunError, ReplicaError) as error:
        print(f"error: worker {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may be inside a collective that this one will not join
    except RuntimeError:
        traceback.print_exc()
        print(f"error: worker {rank} failed, see above", file=sys.stderr, flush=True)
        os._exit(1)
    return 0


def _line(event: Event) -> str:
    """One event as a line for people."""
    match event:
        case Stepped(step, steps, metrics):
            loss = metrics["loss"]
            shown = "not finite" if loss is None else f"{loss:.4f}"
            return (
                f"step {step}/{steps}  loss {shown}  "
                f"{metrics['tokens_per_second']:,.0f} tokens/s  eta {metrics['eta_seconds']:.0f} s"
            )
        case Evaluated() | Streamed():
            return str(event)
    name = {Started: "start", Ended: "end", Warned: "warning"}[type(event)]
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in asdict(event).items())


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by sys.exit: a library's thread that still runs when the interpreter tears itself down has
    # aborted a worker ("terminate called without an active exception") whose run was on disk.
    os._exit(status)
