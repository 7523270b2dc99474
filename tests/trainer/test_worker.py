"""How workers find each other."""

import psutil
import torch.distributed as dist

from tests.distributed import run_distributed


def _listening() -> set[str]:
    dist.barrier()
    connections = psutil.Process().net_connections()
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_local_workers_listen_on_loopback_alone():
    """Neither the store nor gloo is to be reached from another machine."""
    assert run_distributed(_listening, 2, fresh=True) == [{"127.0.0.1"}] * 2
