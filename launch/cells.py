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

    def hardware(self) -> str:
        """What the first worker runs on."""
        import ray

        return ray.get(self._workers[0].hardware.remote())

    def measure(
        self,
        what: str,
        config: Config,
        arguments: Sequence[Any],
        seconds: float,
        memory_bytes: int | None,
    ) -> list[dict[str, Any]]:
        """`trainer.measure.WHAT(config, *arguments)` on all workers, or on the first for "reading".

        The results in rank order, {"failed": why} where there is none; as soon as one worker has
        none, the others are stopped.
        """
        import ray

        places = ray.get([worker.place.remote() for worker in self._workers])
        settings = environments(places, self._cpus)
        if what == "reading":  # the first worker has its machine to itself
            cpus = self._cpus * [node for node, _, _ in places].count(places[0][0])
            settings = [{"OMP_NUM_THREADS": str(max(1, int(cpus)))}]
        call = what, config, tuple(arguments), seconds, memory_bytes
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
                ray.get([worker.stop.remote() for worker in self._workers])
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

    def hardware(self) -> str:
        from trainer.measure import hardware

        return hardware()

    def measure(
        self,
        environment: dict[str, str],
        what: str,
        config: Config,
        arguments: tuple[Any, ...],
        seconds: float,
        memory_bytes: int | None,
    ) -> dict[str, Any]:
        from trainer.measure import MEASURES, Cell

        self._cell = Cell(MEASURES[what], config, arguments, environment, memory_bytes)
        return self._cell.wait(seconds)

    def stop(self) -> None:
        if self._cell is not None:
            self._cell.stop()
