"""Run a function on N gloo ranks, each a process of its own.

The ranks are forked from a server that has already imported the heavy libraries, so a start costs a
fraction of a second instead of N imports.
"""

import multiprocessing
import os
import socket
import traceback
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "tests.distributed", "trainer.train"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_distributed(function: Any, world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """`function(*args)` on every rank of a new gloo world; the results in rank order.

    Raises AssertionError with the traceback of every rank that failed.
    """
    port = free_port()
    results = CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(target=_rank, args=(rank, world_size, port, results, function, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    outcomes: dict[int, tuple[bool, Any]] = {}
    try:
        while len(outcomes) < world_size:
            rank, ok, value = results.get(timeout=timeout)
            outcomes[rank] = (ok, value)
            if not ok:
                break
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    failed = [f"rank {rank}:\n{value}" for rank, (ok, value) in outcomes.items() if not ok]
    assert not failed, "\n".join(failed)
    return [outcomes[rank][1] for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, results: Any, function: Any, args: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with NaN in uninitialised memory, as in conftest.py
    try:
        from trainer.worker import join_group

        join_group(timeout_seconds=60)
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
