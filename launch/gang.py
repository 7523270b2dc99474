"""A gang of processes on Ray: joined or started, placed together, killed together.

Workers are actors, each bound to its machine. Ray Train would start the same gang in 16 s instead
of 3, runs it in a thread without signals, tells the driver of the ranks that failed first only, and
loses an exception that does not unpickle.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from launch.placement import Plan, Rooms, plan, shown
from trainer.config import Config

PACKAGES = ("data_prep", "launch", "models", "trainer")  # what workers import
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray inside `ray job submit`
PASSED_ON = ("NCCL_", "GLOO_", "TORCH_NCCL_")  # what a user sets of the collectives
SETTLE_SECONDS = 5
REACH_SECONDS = 5.0  # for a cluster's address to answer
START_SECONDS = 120  # for a process to be started on a machine that has room for it
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


class Place(NamedTuple):
    """Where a worker is."""

    node: str
    address: str
    port: int  # a free one
    host: str = ""
    interface: str = ""  # that has the address


class LaunchError(RuntimeError):
    """The run ended with a fault; the message is for the person who started it."""


class NoRoom(LaunchError):
    """Now; there may be later."""


def connect(config: Config) -> None:
    """Join the cluster of RAY_ADDRESS, or start a Ray of our own, bound to loopback."""
    root = Path(__file__).resolve().parents[1]
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else a warning about CUDA devices
    if address := os.environ.get("RAY_ADDRESS"):
        _check_reachable(address)
        import ray

        # inside a job the working directory has been uploaded already; the folder that holds our
        # packages may be a whole site-packages
        ours = {"py_modules": [str(root / name) for name in PACKAGES]}
        environment = {} if IN_JOB in os.environ else ours
        try:
            with _signals_kept():
                ray.init(runtime_env=environment, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LaunchError(no_cluster(str(error))) from None
        return
    # Read when Ray is imported: without the first it would bind to the network's address.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray keeps the first it saw
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would end a whole worker where memory runs out; Linux ends what took it.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Its control service, lost, does not come back: be told soon, and start another.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    import ray

    launch = config.launch
    with _signals_kept():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, round(launch.workers * launch.cpus_per_worker + 0.5)),
            object_store_memory=100 << 20,  # only progress lines pass through it
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(root)}},
            **quiet,
        )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Whoever watches for a stop (launch.stop) still does: Ray's own handler of SIGTERM exits."""
    watched = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    kept = {number: handler for number in watched if callable(handler := signal.getsignal(number))}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def no_cluster(reason: str) -> str:
    """What a person is told."""
    return (
        f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({reason}): "
        f"start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine"
    )


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes. Raises LaunchError where nobody listens there."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, or a name that is Ray's to understand
    deadline = time.monotonic() + REACH_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(no_cluster(str(error))) from None
        time.sleep(0.5)


def rooms(config: Config) -> Rooms:
    """How many workers each machine could take now; one that is to be drained takes none."""
    from ray._private import state  # the public call adds all machines up

    leaving, wanted = draining(), _bundle(config)
    found = {}
    for node, free in state.available_resources_per_node().items():
        room = min(int(free.get(name, 0) / each + 1e-6) for name, each in wanted.items())
        if room and node not in leaving:
            found[node] = room
    return found


def draining() -> set[str]:
    """Machines that are about to be taken away."""
    from ray._private import state

    return set(state.state.get_draining_nodes())


def find_room(
    config: Config, told: Callable[[str], None], should_stop: Callable[[], bool]
) -> Plan | None:
    """Wait for room for all workers, launch.wait_seconds long; then take what min_workers allows.

    None where it was asked to stop. Raises NoRoom where there is none for that either, or where it
    is spread unevenly; ConnectionError where a process of our own Ray is gone.
    """
    launch = config.launch
    whole, least = launch.workers, launch.min_workers or launch.workers
    started = time.monotonic()
    waits = False
    try:
        while True:
            found = rooms(config)
            planned = plan(config, found)
            waited = time.monotonic() - started
            if planned and (planned.workers == whole or waited > launch.wait_seconds):
                return planned
            check_own_ray()
            if should_stop():
                return None
            # what a lost worker held may be on its way back for a moment
            if waited > SETTLE_SECONDS and not planned and sum(found.values()) >= whole:
                raise NoRoom(
                    f"{whole} workers (at least {least}) do not spread evenly over the machines, "
                    f"whose room is {shown(found)}: every machine that is used must take as many; "
                    f"change launch.workers, launch.min_workers or parallel.sp"
                )
            if waited > launch.wait_seconds:
                raise NoRoom(
                    f"the cluster has no room for launch.workers {whole} (at least {least}) of "
                    f"{_bundle(config)} each after launch.wait_seconds {launch.wait_seconds:g}: "
                    f"{shown(found)}"
                )
            if not waits and waited > SETTLE_SECONDS:
                waits = True
                _ask_for_machines(config, whole)
                told(
                    f"room for {planned.workers if planned else 0} of {whole} workers so far "
                    f"({shown(found)}), waiting up to launch.wait_seconds {launch.wait_seconds:g}"
                )
            time.sleep(0.2)
    finally:
        if waits:
            _ask_for_machines(config, 0)


def check_own_ray() -> None:
    """Raises ConnectionError where a process of the Ray that `connect` has started is gone."""
    import ray

    node = ray._private.worker._global_node  # None in a cluster that was joined
    if node and not os.environ.get("RAY_ADDRESS") and not node.remaining_processes_alive():
        raise ConnectionError("a process of Ray's own is gone")


def _bundle(config: Config) -> dict[str, float]:
    launch = config.launch
    gpus = {"GPU": launch.gpus_per_worker} if launch.gpus_per_worker else {}
    return {"CPU": launch.cpus_per_worker, **gpus}


def _ask_for_machines(config: Config, workers: int) -> None:
    """Of an autoscaler, where the cluster has one."""
    from ray.autoscaler.sdk import request_resources

    with contextlib.suppress(Exception):  # a wish; whether it is granted is seen by room
        request_resources(bundles=[_bundle(config)] * workers)


@contextmanager
def gang(
    config: Config, kind: type, nodes: tuple[str, ...], **options: Any
) -> Iterator[tuple[list[Any], list[Place]]]:
    """A worker on each of `nodes`, an actor of class `kind`, in rank order, and where each one is.

    They are killed at the end, whatever they do. Raises LaunchError where one does not start.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    workers: list[Any] = []
    try:
        for node in nodes:
            actor: Any = ray.remote(kind).options(
                **options,
                num_cpus=config.launch.cpus_per_worker,
                num_gpus=config.launch.gpus_per_worker,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            workers.append(actor.remote())
        started = [worker.place.remote() for worker in workers]
        try:
            places = ray.get(started, timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise LaunchError(
                f"{len(nodes)} workers did not start within {START_SECONDS} s on machines that had "
                f"room for them: `ray logs` may tell why"
            ) from None
        yield workers, places
    finally:
        for worker in workers:
            with contextlib.suppress(ray.exceptions.RayError):  # it is lost with its machine
                ray.kill(worker)


def environments(places: list[Place], cpus: float) -> list[dict[str, str]]:
    """What torch.distributed reads, per rank."""
    nodes = [place.node for place in places]
    passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    return [
        {
            # else gloo takes whatever address the machine's name has
            **({"GLOO_SOCKET_IFNAME": place.interface} if place.interface else {}),
            **passed,
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(places[0].port),
            "RANK": str(rank),
            "WORLD_SIZE": str(len(nodes)),
            "LOCAL_RANK": str(nodes[:rank].count(place.node)),
            "LOCAL_WORLD_SIZE": str(nodes.count(place.node)),
            "OMP_NUM_THREADS": str(max(1, int(cpus))),
        }
        for rank, place in enumerate(places)
    ]


class Placed:
    """A process that Ray started, on a machine that it chose."""

    def place(self) -> Place:
        import ray

        node = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind((address, 0))
            port = s.getsockname()[1]
        return Place(node, address, port, socket.gethostname(), _interface_of(address))


def _interface_of(address: str) -> str:
    """The network interface that has this IPv4 address; "" where none is found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(s.fileno(), _ADDRESS_OF_INTERFACE, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""
