"""Cells of a comparison on Ray: the same workers measure one after another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from launch.gang import LaunchError, Placed, connect, environments, gang
from trainer.config import Config


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

    def measure(
        self,
        what: str,
        config: Config,
        arguments: Sequence[Any],
        seconds: float,
        memory_bytes: int | None,
    ) -> list[dict[str, Any]]:
        """`trainer.measure.WHAT(config, *arguments)` on all workers, or on the first for "reading".

        The results in rank order, {"failed": why} of a worker that has none; as soon as there is
        one such, the others are stopped.
        """
        import ray

        places = ray.get([worker.place.remote() for worker in self._workers])
        settings = environments(places, self._cpus)
        if what == "reading":  # the first worker has its machine to itself
            cpus = self._cpus * [node for node, _, _ in places].count(places[0][0])
            settings = [{"OMP_NUM_THREADS": str(max(1, int(cpus)))}]
        self._calls += 1
        call = self._calls, what, config, tuple(arguments), seconds, memory_bytes
        waiting = [
            worker.measure.remote(environment, *call)
            for worker, environment in zip(self._workers, settings, strict=False)
        ]
        results: dict[Any, dict[str, Any]] = {}
        left = list(waiting)
        while left:
            done, left = ray.wait(left)
            results.update(zip(done, ray.get(done), strict=True))
            if any("failed" in results[reference] for reference in done):
                ray.get([worker.stop.remote(self._calls) for worker in self._workers])
        return [results[reference] for reference in waiting]


@contextmanager
def cell_gang(config: Config) -> Iterator[CellGang]:
    """Start Ray, or join the cluster of RAY_ADDRESS, with the workers of `config`."""
    connect(config)
    import ray

    try:
        with gang(config, _CellWorker, max_concurrency=2) as (workers, _):
            yield CellGang(workers, config)
    except ray.exceptions.RayError as error:
        raise LaunchError(f"a worker was lost ({type(error).__name__}): start again") from error
    finally:
        ray.shutdown()


class _CellWorker(Placed):
    """One rank of every cell. `stop` is called while `measure` waits."""

    def __init__(self) -> None:
        self._cell: Any = None
        self._stopped = 0  # the last call that was to be stopped

    def hardware(self, use_gpu: bool) -> str:
        from trainer.measure import hardware

        return hardware(use_gpu)

    def measure(
        self,
        environment: dict[str, str],
        call: int,
        what: str,
        config: Config,
        arguments: tuple[Any, ...],
        seconds: float,
        memory_bytes: int | None,
    ) -> dict[str, Any]:
        from trainer.measure import MEASURES, Cell

        self._cell = Cell(MEASURES[what], config, arguments, environment, memory_bytes)
        if self._stopped == call:  # before it had begun
            self._cell.stop()
        return self._cell.wait(seconds)

    def stop(self, call: int) -> None:
        self._stopped = call
        if self._cell is not None:
            self._cell.stop()
