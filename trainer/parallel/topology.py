"""dp x sp ranks and their groups, and what DeepSpeed asks of them.

rank = dp_rank * sp_size + sp_rank: the ranks of one sequence are neighbours, so that their exchange
stays inside a machine where it can.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.sequence_group import SequenceGroup

T = TypeVar("T")


class Peers:
    """All workers, in a group of their own: what one knows, all know."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and tells for all."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value of every worker, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every worker; if it fails on any, the same ValueError is raised on all.

        Without it one worker raises while the others wait for it in their next collective. What
        nobody foresaw is a RuntimeError on the others.
        """
        value, fault, unforeseen = None, None, None
        try:
            value = action()
        except (ValueError, OSError) as error:
            fault = str(error)
        except Exception as error:
            fault, unforeseen = f"{type(error).__name__}: {error}", error
        told = self.gather_objects((fault, unforeseen is not None))
        if unforeseen:
            raise unforeseen
        if faults := sorted({fault for fault, _ in told if fault}):
            kind = RuntimeError if any(surprise for _, surprise in told) else ValueError
            raise kind("\n".join(faults))
        return cast(T, value)

    def on_first(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the others wait; a failure is every worker's."""
        self.together(action if self.first else lambda: None)


class Topology(Peers):
    """Where this rank stands in dp x sp. Passed to DeepSpeed as its `mpu`.

    Gradients are summed over SP and averaged over DP, so a loss that is the local sum over the
    token count of the whole SP group is exact; ZeRO shards over all dp * sp ranks.
    """

    def __init__(self, sp_size: int, timeout_seconds: float = 600.0) -> None:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size % sp_size:
            raise ValueError(
                f"parallel.sp {sp_size} does not divide the {world_size} workers: "
                f"start a multiple of {sp_size} workers, or change parallel.sp"
            )
        self.sp_size, self.dp_size = sp_size, world_size // sp_size
        self.dp_rank, self.sp_rank = divmod(rank, sp_size)
        timeout = timedelta(seconds=timeout_seconds)
        # Every rank makes every group, in the same order: a rule of torch.distributed.
        rows = [list(range(r * sp_size, (r + 1) * sp_size)) for r in range(self.dp_size)]
        row_groups = [dist.new_group(ranks, timeout=timeout) for ranks in rows]
        self._alone: Any = dist.new_group([rank], timeout=timeout, use_local_synchronization=True)
        super().__init__(dist.new_group(list(range(world_size)), timeout=timeout))
        # On the CPU whatever the device; storage may be slower than any exchange of a step.
        self.aside = Peers(
            dist.new_group(list(range(world_size)), timeout=6 * timeout, backend="gloo")
        )
        self.sequence = SequenceGroup(self.sp_rank, rows[self.dp_rank], row_groups[self.dp_rank])

    def destroy(self) -> None:
        """Leave the groups; for a process that goes on to other runs."""
        for group in (self.sequence.group, self._alone, self.aside.group, self.group):
            dist.destroy_process_group(group)

    def gather(self, x: Tensor) -> Tensor:
        """x [...] of every worker as [dp * sp, ...], in rank order."""
        gathered = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(gathered, x, group=self.group)
        return torch.stack(gathered)

    # The names below are DeepSpeed's. Sizes and ranks of "data parallel" count dp alone, which its
    # batch arithmetic wants; the group is all workers, or ZeRO-3 would never sum over a sequence.

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> Any:
        return self._alone

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return self.dp_size

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_sequence_parallel_world_size(self) -> int:
        return self.sp_size

    def get_sequence_parallel_rank(self) -> int:
        return self.sp_rank

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence.group

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.world_size

    def get_sequence_data_parallel_rank(self) -> int:
        return self.rank

    def get_sequence_data_parallel_group(self) -> Any:
        return self.group
