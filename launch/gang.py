"""A gang of processes on Ray: joined or started, placed together, killed together.

Workers are actors in a placement group. Ray Train would start the same gang in 16 s instead of 3,
runs it in a thread without signals, tells the driver of the ranks that failed first only, and loses
an exception that does not unpickle.
"""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import Config

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray inside `ray job submit`


class Place(NamedTuple):
    """Where a worker is."""

    node: str
    address: str
    port: int  # a free one


class LaunchError(RuntimeError):
    """The run ended with a fault; the message is for the person who started it."""


def connect(config: Config) -> None:
    """Join the cluster of RAY_ADDRESS, or start a Ray of our own, bound to loopback."""
    root = str(Path(__file__).resolve().parents[1])
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else a warning about CUDA devices
    if os.environ.get("RAY_ADDRESS"):
        import ray

        # inside a job the working directory has been uploaded already
        environment = {} if IN_JOB in os.environ else {"working_dir": root}
        try:
            ray.init(runtime_env=environment, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LaunchError(
                f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({error}): "
                f"start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine"
            ) from None
        return
    # Read when Ray is imported: without the first it would bind to the network's address.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray keeps the first it saw
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would end a whole worker where memory runs out; Linux ends what took it.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    import ray

    launch = config.launch
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, round(launch.workers * launch.cpus_per_worker + 0.5)),
        object_store_memory=100 << 20,  # only progress lines pass through it
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
        **quiet,
    )


@contextmanager
def gang(config: Config, kind: type, **options: Any) -> Iterator[tuple[list[Any], list[Place]]]:
    """All workers, each an actor of class `kind`, in rank order, and where each one is.

    They are killed at the end, whatever they do. Raises LaunchError where there is no room.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    launch = config.launch
    bundle = {"CPU": launch.cpus_per_worker}
    if launch.gpus_per_worker:
        bundle["GPU"] = launch.gpus_per_worker
    group = placement_group([bundle] * launch.workers, strategy="PACK")
    workers: list[Any] = []
    try:
        if not group.wait(timeout_seconds=120):
            raise LaunchError(
                f"the cluster has no room for launch.workers {launch.workers} of {bundle}: "
                f"it has {ray.cluster_resources()}"
            )
        for index in range(launch.workers):
            actor: Any = ray.remote(kind).options(
                **options,
                num_cpus=launch.cpus_per_worker,
                num_gpus=launch.gpus_per_worker,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                ),
            )
            workers.append(actor.remote())
        places = ray.get([worker.place.remote() for worker in workers])
        # Neighbours in rank share a machine where they can: SP is innermost.
        order = sorted(range(len(workers)), key=lambda i: (places[i].node, i))
        yield [workers[i] for i in order], [places[i] for i in order]
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)


def environments(places: list[Place], cpus: float) -> list[dict[str, str]]:
    """What torch.distributed reads, per rank."""
    nodes = [place.node for place in places]
    return [
        {
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(places[0].port),
            "RANK": str(rank),
            "WORLD_SIZE": str(len(nodes)),
            "LOCAL_RANK": str(nodes[:rank].count(node)),
            "LOCAL_WORLD_SIZE": str(nodes.count(node)),
            "OMP_NUM_THREADS": str(max(1, int(cpus))),
        }
        for rank, node in enumerate(nodes)
    ]


class Placed:
    """A process that Ray started, on a machine that it chose."""

    def place(self) -> Place:
        import ray

        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        node = ray.get_runtime_context().get_node_id()
        return Place(node, ray.util.get_node_ip_address(), port)
