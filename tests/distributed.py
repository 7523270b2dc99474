"""Run a function on N gloo ranks, each a process, which stay up from one call to the next.

The ranks of a world are forked, once, from a server that has imported the heavy libraries already.
A call that fails, or that leaves its processes changed (`fresh`), costs its world. So does one of
another size, and any number of calls in the end: each thread of a gloo group, idle or left behind,
wakes a hundred times a second, and a thousand of them leave no time for anything else.
"""

import atexit
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

MOST_THREADS = 48  # of a rank that is kept

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "tests.distributed", "trainer.train"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_distributed(
    function: Any, world_size: int, *args: Any, timeout: float = 600, fresh: bool = False
) -> list[Any]:
    """`function(*args)` on every rank of a gloo world; the results in rank order.

    `fresh`: in processes of its own, for a function that patches what others use, or dies. Raises
    AssertionError with the traceback of every rank that failed.
    """
    for other in [size for size in _WORLDS if fresh or size != world_size]:
        _WORLDS.pop(other).kill()
    world = _WORLDS.get(world_size) or _World(world_size)
    try:
        results = world.call(function, args, timeout)
    except BaseException:
        if not fresh:
            _WORLDS.pop(world_size, None)
        world.kill()
        raise
    if fresh or world.threads > MOST_THREADS:
        _WORLDS.pop(world_size, None)
        world.kill()
    else:
        _WORLDS[world_size] = world
    return results


class _World:
    """The processes of one world."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        pipes = [CONTEXT.Pipe() for _ in range(world_size)]
        self._ranks = [
            CONTEXT.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        self._pipes = [ours for ours, _ in pipes]
        self.threads = 0  # of the rank that has most

    def call(self, function: Any, args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes: dict[int, tuple[bool, Any, int]] = {}
        deadline = monotonic() + timeout
        while len(outcomes) < len(self._pipes) and all(ok for ok, *_ in outcomes.values()):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in outcomes]
            ready = wait(waiting, max(0, deadline - monotonic()))
            assert ready, f"{len(waiting)} ranks did not answer within {timeout} s"
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except EOFError:
                    outcomes[rank] = (False, "its process died", 0)
        failed = [f"rank {rank}:\n{value}" for rank, (ok, value, _) in outcomes.items() if not ok]
        assert not failed, "\n".join(failed)
        self.threads = max(threads for *_, threads in outcomes.values())
        return [outcomes[rank][1] for rank in range(len(self._pipes))]

    def kill(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join()


_WORLDS: dict[int, _World] = {}  # by size


@atexit.register
def _kill_worlds() -> None:
    for world in _WORLDS.values():
        world.kill()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    """One rank, for as long as it is asked."""
    import torch

    from trainer.worker import join_group

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    join_group(timeout_seconds=60)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # nobody asks any more
            os._exit(0)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # with NaN in new memory, as in conftest.py
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args), len(os.listdir("/proc/self/task"))))
        except BaseException:
            pipe.send((False, traceback.format_exc(), 0))
