"""Cells of a comparison on Ray: the same workers measure one after another."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from launch.compare.child import Call, Child, Failed
from launch.gang import LaunchError, Placed, connect, environments, find_room, gang
from trainer.config import Config
from trainer.provenance import hardware

if TYPE_CHECKING:  # a worker itself imports nothing heavy, its children do
    from launch.compare.measurements import Cost


class CellGang:
    """Workers that measure one cell of a comparison after another, each in a fresh process."""

    def __init__(self, workers: list[Any], config: Config) -> None:
        self._workers, self._cpus = workers, config.launch.cpus_per_worker
        self._use_gpu = config.launch.gpus_per_worker > 0
        self._calls = 0

    def hardware(self) -> str:
        """What the first worker runs on."""
        import ray

        return ray.get(self._workers[0].hardware.remote(self._use_gpu))

    def measure(self, call: Call, alone: bool) -> list[Cost | Failed]:
        """The call on all workers, or on the first `alone`; costs in rank order.

        As soon as one has failed, the others are stopped.
        """
        import ray

        places = ray.get([worker.place.remote() for worker in self._workers])
        settings = environments(places, self._cpus)
        if alone:  # the first worker has its machine to itself
            cpus = self._cpus * [place.node for place in places].count(places[0].node)
            settings = [{"OMP_NUM_THREADS": str(max(1, int(cpus)))}]
        self._calls += 1
        waiting = [
            worker.measure.remote(environment, self._calls, call)
            for worker, environment in zip(self._workers, settings, strict=False)
        ]
        outcomes: dict[Any, Cost | Failed] = {}
        left = list(waiting)
        while left:
            done, left = ray.wait(left)
            answers = (pickle.loads(answer) for answer in ray.get(done))
            outcomes.update(zip(done, answers, strict=True))
            if any(isinstance(outcomes[reference], Failed) for reference in done):
                ray.get([worker.stop.remote(self._calls) for worker in self._workers])
        return [outcomes[reference] for reference in waiting]


@contextmanager
def cell_gang(config: Config, should_stop: Callable[[], bool]) -> Iterator[CellGang | None]:
    """Start Ray, or join the cluster of RAY_ADDRESS, with the workers of `config`.

    None where it was asked to stop before there was room for them.
    """
    connect(config)
    import ray

    try:
        planned = find_room(config, print, should_stop)
        if planned is None:
            yield None
            return
        with gang(config, _CellWorker, planned.nodes, max_concurrency=2) as (workers, _):
            yield CellGang(workers, config)
    except ray.exceptions.RayError as error:
        raise LaunchError(f"a worker was lost ({type(error).__name__}): start again") from error
    finally:
        ray.shutdown()


class _CellWorker(Placed):
    """One rank of every cell. `stop` is called while `measure` waits."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._stopped = 0  # the last call that was to be stopped

    def hardware(self, use_gpu: bool) -> str:
        return hardware(use_gpu)

    def measure(self, environment: dict[str, str], number: int, call: Call) -> bytes:
        """The pickled outcome."""
        self._child = Child(call, environment)
        if self._stopped == number:  # before it had begun
            self._child.stop()
        return self._child.wait_pickled()

    def stop(self, number: int) -> None:
        self._stopped = number
        if self._child is not None:
            self._child.stop()
