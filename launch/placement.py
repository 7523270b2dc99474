"""Which workers are started where: pure, from the room that each machine has. Imports no Ray."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.checks import layout_faults
from trainer.config import Config

Rooms = dict[str, int]  # how many workers each machine could take, by its id


@dataclass(frozen=True)
class Plan:
    """dp x sp workers, and the machine of each rank. Each machine that is used has as many."""

    sp: int
    nodes: tuple[str, ...]

    @property
    def workers(self) -> int:
        return len(self.nodes)

    def applied(self, config: Config) -> Config:
        """The configuration of these workers; the batch and the order of its data stay."""
        return replace(
            config,
            launch=replace(config.launch, workers=self.workers),
            parallel=replace(config.parallel, sp=self.sp),
        )


def plan(config: Config, rooms: Rooms) -> Plan | None:
    """As many workers as there is room for, launch.workers at most and launch.min_workers at least.

    None where even these do not fit. Ranks of a sequence share a machine where they can.
    """
    most, least = config.launch.workers, config.launch.min_workers or config.launch.workers
    for workers in range(min(most, sum(rooms.values())), least - 1, -1):
        for sp in _shardings(config, workers):
            if nodes := _spread(rooms, workers, sp):
                return Plan(sp, nodes)
    return None


def shown(rooms: Rooms) -> str:
    """The room of every machine, for a message."""
    if not rooms:
        return "no machine answers"
    return ", ".join(f"{room} on {node[:8]}" for node, room in sorted(rooms.items()))


def _shardings(config: Config, workers: int) -> Iterator[int]:
    """Every sp that this many workers could have: the configured one, then the highest first.

    Long shards take the most memory. Segments, a curriculum and evaluation must be divided too.
    """
    wanted, train = config.parallel.sp, config.train
    divisors = [sp for sp in range(workers, 0, -1) if workers % sp == 0]
    for sp in sorted(divisors, key=lambda sp: sp != wanted):
        together = workers // sp * train.micro_batch_size  # sequences
        divides = train.seq_len % sp == 0 and train.batch_size % together == 0  # soon told
        as_configured = (workers, sp) == (config.launch.workers, wanted)  # who asks has checked it
        if as_configured or (
            divides and not any(layout_faults(Plan(sp, ("",) * workers).applied(config)))
        ):
            yield sp


def _spread(rooms: Rooms, workers: int, sp: int) -> tuple[str, ...] | None:
    """Equally many workers on as few machines as will do, the roomiest first."""
    roomy = sorted(rooms, key=lambda node: (-rooms[node], node))
    machines = [k for k in range(1, workers + 1) if workers % k == 0]

    def splits_sequences(k: int) -> bool:
        each = workers // k
        return bool(each % sp) and bool(sp % each)

    for k in sorted(machines, key=splits_sequences):
        each = workers // k
        used = roomy[:k]
        if len(used) == k and all(rooms[node] >= each for node in used):
            return tuple(node for node in sorted(used) for _ in range(each))
    return None
