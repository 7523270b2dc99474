"""What one machine can tell of itself, of its storage, and of its way to the others. No Ray.

`launch.doctor` asks a process on each machine, all at once where they meet.
"""

import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.files import sync_to_disk
from data_prep.schema import load_info
from trainer.config import Config
from trainer.engine import versions
from trainer.provenance import processor
from trainer.storage import Mirror
from trainer.worker import join_group

MARK_BYTES = 32 << 20  # of a file that every machine writes
BLOCK_BYTES = 16 << 20  # of a message that shows bandwidth
SMALL_BYTES = 4 << 10  # of one that shows latency: a carry
REACH_SECONDS = 5.0
SEEN_SECONDS = 10.0  # network storage may take a moment to show what another has written


@dataclass(frozen=True)
class Machine:
    """What a machine is."""

    host: str
    processor: str
    cpus: int
    gpus: tuple[str, ...]
    memory_bytes: int
    versions: dict[str, str]
    compiler: bool


@dataclass(frozen=True)
class Link:
    """The way between two ranks, in both directions: a small message's time, and a large one's."""

    ranks: tuple[int, int]
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Collectives:
    """What all machines together take: gathering a carry of each, summing a large tensor."""

    gather_seconds: float
    reduce_bytes_per_second: float  # of the tensor


def describe() -> Machine:
    """This machine."""
    return Machine(
        socket.gethostname(),
        processor(),
        os.cpu_count() or 1,
        tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions(),
        shutil.which("g++") is not None,
    )


def leave_mark(folder: str, name: str) -> float:
    """Write a file there as a checkpoint is written, to the disk; bytes per second. OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, name)
    started = time.perf_counter()
    path.write_bytes(os.urandom(1 << 20) * (MARK_BYTES >> 20))
    sync_to_disk(path)
    return MARK_BYTES / (time.perf_counter() - started)


def missing_marks(folder: str, names: list[str]) -> list[str]:
    """Which of the files that others have written are not to be seen, whole, from here."""
    deadline = time.monotonic() + SEEN_SECONDS

    def missing() -> list[str]:
        paths = (Path(folder, name) for name in names)
        return [p.name for p in paths if not p.is_file() or p.stat().st_size != MARK_BYTES]

    while (left := missing()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def data_identity(path: str) -> str:
    """The fingerprint of prepared data, as it is seen from here. Raises ValueError."""
    return load_info(path).fingerprint


def remote_seconds(address: str, name: str) -> float:
    """How long a small object at `checkpoint.remote` takes, there and back. Raises OSError."""
    started = time.perf_counter()
    Mirror(address).try_out(name)
    return time.perf_counter() - started


class Door:
    """A port that others try to reach."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=1024)
        self.address: tuple[str, int] = self._socket.getsockname()


def unreachable(doors: list[tuple[str, int]]) -> dict[int, str]:
    """Which of the doors cannot be reached from here, by index, and why."""
    faults = {}
    for index, door in enumerate(doors):
        try:
            socket.create_connection(door, REACH_SECONDS).close()
        except OSError as error:
            faults[index] = f"port {door[1]}: {error}"
    return faults


def measure(config: Config) -> tuple[list[Link], Collectives]:
    """Every pair of machines, and all together. Each calls it, with torch.distributed's variables.

    Pairs that have no machine in common are measured at once: n machines take n - 1 rounds.
    """
    device = join_group(60, config.launch.gpus_per_worker > 0)
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        small = torch.zeros(SMALL_BYTES // 4, device=device)
        block = torch.zeros(BLOCK_BYTES // 4, device=device)
        mine = []
        for pairs in rounds(world_size):
            dist.barrier()
            for pair in pairs:
                if rank in pair:
                    latency = _there_and_back(small, rank, pair, 50) / 2
                    seconds = _there_and_back(block, rank, pair, 4) / 2
                    if rank == pair[0]:
                        mine.append(Link(pair, latency, BLOCK_BYTES / seconds))
        everyone: list[list[Link]] = [[]] * world_size
        dist.all_gather_object(everyone, mine)
        parts = [torch.empty_like(small) for _ in range(world_size)]
        gather = _median_seconds(lambda: dist.all_gather(parts, small), device, 20)
        reduce = _median_seconds(lambda: dist.all_reduce(block), device, 4)
        links = [link for found in everyone for link in found]
        return links, Collectives(gather, BLOCK_BYTES / reduce)
    finally:
        dist.destroy_process_group()


def rounds(n: int) -> list[list[tuple[int, int]]]:
    """Every pair of n once, in rounds in which each is in one pair at most.

    Source: the circle method of a round-robin tournament.
    """
    ring = list(range(n + n % 2))
    half, played = len(ring) // 2, []
    for _ in range(len(ring) - 1):
        facing = zip(ring[:half], reversed(ring[half:]), strict=True)
        played.append([(min(pair), max(pair)) for pair in facing if max(pair) < n])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return played


def _there_and_back(x: torch.Tensor, rank: int, pair: tuple[int, int], times: int) -> float:
    """Median seconds for `x` to go to the second of the pair, and to come back."""
    first, second = pair

    def bounce() -> None:
        if rank == first:
            dist.send(x, second)
            dist.recv(x, second)
        else:
            dist.recv(x, first)
            dist.send(x, first)

    return _median_seconds(bounce, x.device, times)


def _median_seconds(action: Callable[[], object], device: torch.device, times: int) -> float:
    seconds = []
    for _ in range(times + 1):  # the first opens the connection
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
