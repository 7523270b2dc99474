"""A worker: a configuration on a device, at its place among the others. The only start-up."""

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from data_prep.blocks import DataError
from trainer.config import Config
from trainer.events import Event, Pulse, Report, Stop, Warned, silent
from trainer.layout import Layout
from trainer.memory import keep_freed_memory
from trainer.parallel.topology import Topology

T = TypeVar("T")
_ALONE = {"RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Worker:
    """One process of a run. Every worker makes every call that exchanges, in the same order."""

    config: Config
    device: torch.device
    topology: Topology
    report: Report = silent
    pulse: Pulse = field(default_factory=Pulse)

    @classmethod
    def join(cls, config: Config, report: Report = silent, pulse: Pulse | None = None) -> "Worker":
        """Take this process's place in the world that its launcher has described.

        Raises ValueError where there is none, or GPUs are asked for and too few.
        """
        keep_freed_memory()
        parallel = config.parallel
        device = join_group(parallel.timeout_seconds, config.launch.gpus_per_worker > 0)
        return cls(
            config,
            device,
            Topology(parallel.sp, parallel.timeout_seconds),
            report,
            pulse or Pulse(),
        )

    @property
    def layout(self) -> Layout:
        """Which tokens of a sequence this rank holds."""
        return self.config.layout(self.topology.sp_rank)

    def tell(self, event: Event) -> Stop:
        """Report it, if this is rank 0; what whoever watches asks for."""
        return self.report(event) if self.topology.first else Stop.NO

    def warn(self, message: str) -> None:
        self.tell(Warned(message))

    def read_together(self, read: Callable[[], T], *flags: bool) -> tuple[T, list[bool]]:
        """What `read` gives on each worker, and whether any raised each of the flags.

        All raise the same DataError where one cannot read; what nobody foresaw is a RuntimeError on
        the others, that they do not wait for it.
        """
        value, fault, unforeseen = None, None, None
        try:
            value = read()
        except DataError as error:
            fault = str(error)
        except Exception as error:
            fault, unforeseen = f"{type(error).__name__}: {error}", error
        mine = torch.tensor([fault is not None, *flags], device=self.device)
        failed, *raised = self.topology.gather(mine.int()).any(0).tolist()
        if failed:
            told = self.topology.gather_objects((fault, unforeseen is not None))
            if unforeseen:
                raise unforeseen
            kind = RuntimeError if any(surprise for _, surprise in told) else DataError
            raise kind("\n".join(sorted({fault for fault, _ in told if fault})))
        return cast(T, value), raised


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether it has instructions for it; a processor without is some 40 times slower than fp32."""
    if device.type == "cuda" or not torch.backends.mkldnn.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def join_group(timeout_seconds: float, use_gpu: bool = False) -> torch.device:
    """Join the process group (NCCL with GPUs, gloo without) and return this rank's device.

    Reads the usual RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them this is
    a run of one process. A group that the launcher has already joined is kept.
    Raises ValueError where GPUs are asked for and there are too few.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed reads it too
    device = torch.device("cpu")
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    else:  # a launcher may show a worker all GPUs of the machine, or its own alone
        visible = torch.cuda.device_count()
        if visible == 0 or (1 < visible <= local_rank):
            raise ValueError(
                f"launch.gpus_per_worker asks for GPUs, but worker {local_rank} of this machine "
                f"finds {visible}: start fewer workers on it, or set launch.gpus_per_worker 0"
            )
        device = torch.device("cuda", local_rank if visible > 1 else 0)
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        backend = "nccl" if use_gpu else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves one
            dist.init_process_group(backend, timeout=timeout)
            return device
        rank, world_size = (int(os.environ.get(k, d)) for k, d in _ALONE.items())
        store = _store(rank, world_size, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    return device


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Where the workers find each other: at the address of the first one, and no other of its.

    torch's own would listen on every address of the machine.
    """
    if "RANK" not in os.environ:
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    local = ipaddress.ip_address(address[4][0]).is_loopback
    if local and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else by the machine's name
    listening: int | None = None
    if rank == 0:
        opened = socket.socket(address[0])
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address[4])
        opened.listen(world_size)
        listening = opened.detach()
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=listening is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening,
    )
