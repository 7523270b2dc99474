"""A process whose end is the end of everything below it, however it ends. Linux."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def run_below(child: Callable[[], None]) -> NoReturn:
    """Fork, run `child` below this process, and end with it; nothing that it started outlives it.

    Should the process that started this one die, or send SIGHUP, so do `child` and all that it has
    started, at once. For a process that has not imported much and has one thread.
    """
    _prctl(_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes a child of this process
    parent = os.getppid()
    for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(wish, signal.SIG_IGN)  # asked of the process above, which asks the child
    hung_up: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: hung_up.append(number))
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        child()
        os._exit(0)
    status = None
    while status is None and os.getppid() == parent and not hung_up:
        time.sleep(0.05)
        status = _reap(pid)
    _kill_below()
    os._exit(1 if status is None else os.waitstatus_to_exitcode(status) & 0xFF)


def _reap(pid: int) -> int | None:
    """The status of child `pid`, if it has ended; whatever else has ended is forgotten."""
    status = None
    try:
        while True:
            ended, how = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                return status
            status = how if ended == pid else status
    except ChildProcessError:
        return status


def _kill_below(patience_seconds: float = 10.0) -> None:
    """Until there are none: what dies leaves its children to this process."""
    deadline = time.monotonic() + patience_seconds
    while (below := list(_descendants(os.getpid()))) and time.monotonic() < deadline:
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
        _reap(0)


def _descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as f:
                    # its name may hold spaces and brackets
                    parent = int(f.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # gone already
                continue
            children.setdefault(parent, []).append(int(name))
    left = [root]
    while left:
        below = children.get(left.pop(), [])
        yield from below
        left += below


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        print(f"prctl({option}): {os.strerror(ctypes.get_errno())}", file=sys.stderr)
