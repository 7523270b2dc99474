"""Ctrl-C, pre-emption and time limits: wishes to stop in good order."""

import signal
import time
from contextlib import suppress
from types import FrameType

PREEMPTED = 75  # the exit status of a run that is to be started again: sysexits' EX_TEMPFAIL


class StopWatch:
    """Whether to stop, and whether because a person or because a machine wanted it so."""

    def __init__(self, message: str, max_seconds: float | None = None) -> None:
        """Watches signals from here on; a second Ctrl-C or SIGTERM stops at once."""
        self._message, self._asked, self.preempted = message, False, False
        self._heard = False  # Ctrl-C or SIGTERM
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(wish, self._ask)

    def __call__(self) -> bool:
        if self._deadline and time.monotonic() > self._deadline and not self._asked:
            self._stop("run.max_seconds have passed", preempted=True)
        return self._asked

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if (number == signal.SIGINT and self._asked) or (number == signal.SIGTERM and self._heard):
            raise KeyboardInterrupt
        self._heard |= number != signal.SIGUSR1
        again = "; again to stop at once"
        if number == signal.SIGINT:
            self._stop(f"\n{self._message}{again}", preempted=False)
        else:
            self._stop(f"\n{signal.Signals(number).name}: {self._message}", preempted=True)

    def _stop(self, told: str, preempted: bool) -> None:
        self._asked, self.preempted = True, self.preempted or preempted
        with suppress(OSError):  # whoever read it may have ended by the same Ctrl-C
            print(told, flush=True)
