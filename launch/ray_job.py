"""The door to Ray: a gang of workers, one process each, that run the trainer and may be restarted.

Workers are actors in a placement group. Ray Train would start the same gang in 16 s instead of 3,
runs it in a thread without signals, tells the driver of the ranks that failed first only, and loses
an exception that does not unpickle.
"""

import json
import logging
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray inside `ray job submit`
Event = dict[str, Any]


class LaunchError(RuntimeError):
    """The run ended with a fault; the message is for the person who started it."""


@dataclass(frozen=True)
class Outcome:
    """How one worker ended: in good order, with a fault of the run, a crash, or lost altogether."""

    rank: int
    kind: str  # done, fault, crash, lost
    message: str = ""


def place_faults(config: Config) -> list[str]:
    """What cannot work where the workers will be: relative paths mean nothing on other machines."""
    if not os.environ.get("RAY_ADDRESS"):
        return []
    return [
        f"{key}: {value} is relative, but workers of a cluster start in folders of their own that "
        f"are deleted: give an absolute path on storage that all of them share"
        for key, value in (("run.dir", config.run.dir), ("data.path", config.data.path))
        if "://" not in value and not Path(value).is_absolute()
    ]


def run_job(
    config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> bool:
    """Train `config` on Ray: a local one, or the cluster of RAY_ADDRESS. True when it finished.

    `on_event` sees what rank 0 reports; once `should_stop` is true the workers are asked to stop,
    which they do after a checkpoint. Lost workers are replaced up to launch.max_failures times.
    Raises LaunchError.
    """
    _connect(config)
    import ray

    try:
        failures = 0
        while True:
            try:
                outcomes, finished = _run_gang(config, on_event, should_stop)
            except ray.exceptions.RayError as error:  # lost before or beside its run
                lost_early = f"a worker was lost ({type(error).__name__})"
                outcomes, finished = [Outcome(0, "lost", lost_early)], False
            faults = [o for o in outcomes if o.kind == "fault"]
            if faults:
                raise LaunchError(_shared_message(faults))
            if all(o.kind == "done" for o in outcomes):
                return finished
            lost = [o for o in outcomes if o.kind == "lost"] or _silent(outcomes, config)
            shown = "; ".join(
                f"worker {o.rank}: {o.message}" for o in lost or outcomes if o.message
            )
            if not lost:
                raise LaunchError(f"the workers failed\n{shown}")
            failures += 1
            if failures > config.launch.max_failures:
                raise LaunchError(f"{shown} (restart {failures - 1} was the last allowed)")
            on_event(
                {
                    "event": "warning",
                    "message": f"{shown}: starting all workers again from the last checkpoint "
                    f"({failures} of {config.launch.max_failures})",
                }
            )
    finally:
        ray.shutdown()


def _shared_message(faults: list[Outcome]) -> str:
    """One message for all ranks that say the same."""
    messages: dict[str, list[int]] = {}
    for fault in faults:
        messages.setdefault(fault.message, []).append(fault.rank)
    return "\n".join(
        f"{message} (worker {', '.join(map(str, sorted(ranks)))})"
        for message, ranks in messages.items()
    )


def _silent(outcomes: list[Outcome], config: Config) -> list[Outcome]:
    """The workers that the others waited for in vain: alive, perhaps, but hung."""
    if not any("timed out" in o.message.lower() for o in outcomes):
        return []
    answered = {o.rank for o in outcomes}
    waited = f"did not answer for parallel.timeout_seconds {config.parallel.timeout_seconds:g}"
    return [
        Outcome(rank, "lost", waited)
        for rank in range(config.launch.workers)
        if rank not in answered
    ]


def _connect(config: Config) -> None:
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
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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


def _run_gang(
    config: Config, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> tuple[list[Outcome], bool]:
    """Start all workers, follow them to their end, and leave none behind."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    launch = config.launch
    bundle = {"CPU": launch.cpus_per_worker}
    if launch.gpus_per_worker:
        bundle["GPU"] = launch.gpus_per_worker
    group = placement_group([bundle] * launch.workers, strategy="PACK")
    board = ray.remote(num_cpus=0)(_Board).remote()
    workers: list[Any] = []
    try:
        if not group.wait(timeout_seconds=120):
            raise LaunchError(
                f"the cluster has no room for launch.workers {launch.workers} of {bundle}: "
                f"it has {ray.cluster_resources()}"
            )
        for index in range(launch.workers):
            options = ray.remote(_Worker).options(
                num_cpus=launch.cpus_per_worker,
                num_gpus=launch.gpus_per_worker,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                ),
            )
            workers.append(options.remote())
        places = ray.get([worker.place.remote() for worker in workers])
        # Neighbours in rank share a machine where they can: SP is innermost.
        order = sorted(range(len(workers)), key=lambda i: (places[i][0], i))
        workers, places = [workers[i] for i in order], [places[i] for i in order]
        environments = _environments(places, launch.cpus_per_worker)
        running = {
            worker.run.remote(config, environment, board): rank
            for rank, (worker, environment) in enumerate(zip(workers, environments, strict=True))
        }
        return _follow(running, board, on_event, should_stop)
    finally:
        for worker in [*workers, board]:
            ray.kill(worker)
        remove_placement_group(group)


def _environments(places: list[tuple[str, str, int]], cpus: float) -> list[dict[str, str]]:
    """What torch.distributed reads, per rank, from each worker's (node, address, free port)."""
    nodes = [node for node, _, _ in places]
    return [
        {
            "MASTER_ADDR": places[0][1],
            "MASTER_PORT": str(places[0][2]),
            "RANK": str(rank),
            "WORLD_SIZE": str(len(nodes)),
            "LOCAL_RANK": str(nodes[:rank].count(node)),
            "LOCAL_WORLD_SIZE": str(nodes.count(node)),
            "OMP_NUM_THREADS": str(max(1, int(cpus))),
        }
        for rank, node in enumerate(nodes)
    ]


def _follow(
    running: dict[Any, int],
    board: Any,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> tuple[list[Outcome], bool]:
    """Pass events on until every worker has ended, or 3 s after the first that failed."""
    import ray

    outcomes: list[Outcome] = []
    finished = False
    failed_at = None
    while running and (failed_at is None or time.monotonic() - failed_at < 3):
        done, _ = ray.wait(list(running), timeout=0.2)
        events = ray.get(board.take.remote(should_stop()))
        for reference in done:
            outcome = _outcome(reference, running.pop(reference))
            outcomes.append(outcome)
            if outcome.kind != "done":
                failed_at = failed_at or time.monotonic()
        for event in events:
            finished |= event["event"] == "end" and event["step"] == event["steps"]
            on_event(event)
    for event in ray.get(board.take.remote(False)):
        finished |= event["event"] == "end" and event["step"] == event["steps"]
        on_event(event)
    return outcomes, finished


def _outcome(reference: Any, rank: int) -> Outcome:
    import ray

    try:
        kind, message = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(rank, "lost", f"its process was lost ({type(error).__name__})")
    return Outcome(rank, kind, message)


class _Board:
    """Where rank 0 leaves its events and finds whether to stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stop = False

    def put(self, event: Event) -> bool:
        self.events.append(event)
        return self.stop

    def take(self, stop: bool) -> list[Event]:
        self.stop |= stop
        events, self.events = self.events, []
        return events


class _Worker:
    """One rank: a process of its own that runs the trainer once."""

    def place(self) -> tuple[str, str, int]:
        """(node, address, a free port on it)."""
        import ray

        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def run(self, config: Config, environment: dict[str, str], board: Any) -> tuple[str, str]:
        """Train; ("done", "") or what went wrong. Exceptions are told as text, never pickled."""
        import ray

        os.environ.update(environment)
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        from trainer.train import RunError, train

        answer = None

        def report(event: Event) -> bool:
            # The answer to the last event is taken, so that a step never waits for the board.
            nonlocal answer
            stop = bool(ray.get(answer)) if answer is not None else False
            answer = board.put.remote(json.loads(json.dumps(event)))
            return stop

        try:
            train(config, report)
        except (ValueError, RunError) as error:
            return "fault", str(error)
        except Exception:  # told to the driver, which decides for all workers
            return "crash", traceback.format_exc()
        if answer is not None:
            ray.get(answer)
        return "done", ""
