"""Ctrl-C and pre-emption: a wish to stop in good order."""

import signal
from collections.abc import Callable
from types import FrameType


def watch_signals(message: str) -> Callable[[], bool]:
    """Whether Ctrl-C or a pre-emption has asked to stop in good order; the second stops at once."""
    asked = 0

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise KeyboardInterrupt
        print(f"\n{message}; again to stop at once", flush=True)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    return lambda: asked > 0
