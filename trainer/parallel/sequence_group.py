"""The ranks that hold one sequence between them, and the collectives among them.

Each collective is a torch operator: activation checkpointing can name it and keep its small result,
so that no exchange is run twice (recompute.py), and the compiler does not trace into it.
"""

import time
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op


@dataclass
class ExchangeMeter:
    """What the exchanges between the ranks of one sequence cost this rank.

    `seconds` is the wall time inside the collectives, waiting for slower ranks included; on CUDA
    the calls return before the work is done and only their launch is seen. `sent_bytes` counts the
    payload this rank gives into each collective.
    """

    seconds: float = 0.0
    sent_bytes: int = 0

    def take(self) -> tuple[float, int]:
        """Seconds and bytes since the last call."""
        taken = self.seconds, self.sent_bytes
        self.seconds, self.sent_bytes = 0.0, 0
        return taken

    def add(self, start: float, sent_bytes: int) -> None:
        """A collective that began at `start` and into which this rank gave `sent_bytes`."""
        self.seconds += time.perf_counter() - start
        self.sent_bytes += sent_bytes


@dataclass
class RelayMeter:
    """What relays have cost this step, the worst of all ranks of the sequence."""

    rounds: int = 0  # of the relay that took most, one where no guess was wrong
    rerun_tokens: int = 0  # run again one after the other, by all relays
    residual: float = 0.0  # what was left between states, or of a gradient, where it was broken off

    def take(self) -> "RelayMeter":
        """All since the last call."""
        taken = RelayMeter(self.rounds, self.rerun_tokens, self.residual)
        self.rounds, self.rerun_tokens, self.residual = 0, 0, 0.0
        return taken

    def figures(self) -> dict[str, float]:
        """As a step's metrics; none where nothing is relayed."""
        named = {f"relay_{name}": value for name, value in asdict(self).items()}
        return named if self.rounds else {}

    def add(self, rounds: int, rerun_tokens: int, residual: float) -> None:
        """A round of a relay: its number, and what the slowest rank did in it."""
        self.rounds = max(self.rounds, rounds)
        self.rerun_tokens += rerun_tokens
        self.residual = max(self.residual, residual)


class SequenceGroup:
    """The SP group: the ranks that hold one sequence between them, in order.

    The methods are the only collectives of the sequence dimension, each metered.
    """

    def __init__(self, rank: int, ranks: list[int], group: Any) -> None:
        self.rank = rank  # within the group
        self.ranks = ranks  # global ranks
        self.group = group
        self.meter = ExchangeMeter()
        self.relays = RelayMeter()
        self.name = f"sequence-{next(_NUMBERS)}"  # operators take no objects
        _GROUPS[self.name] = self

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_gather(self, x: Tensor) -> Tensor:
        """x [...] of every rank as [P, ...], in rank order."""
        return _all_gather(x, self.name)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """x of the rank `source` of the group, on every rank; a new tensor."""
        return _broadcast(x, source, self.name)

    def shift(self, x: Tensor, step: int, outside: Tensor) -> Tensor:
        """x of the rank `step` places to the left (negative: to the right), a new tensor.

        A copy of `outside`, of the same shape and dtype, where that is past the end.
        """
        return _shift(x, outside, step, self.name)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Part i of x [P, ...] goes to rank i; the parts that came, [P, ...]. Differentiable."""
        return _all_to_all(x, self.name)


_NUMBERS = count()
_GROUPS: WeakValueDictionary[str, SequenceGroup] = WeakValueDictionary()


@custom_op("longhaul::all_gather", mutates_args=())
def _all_gather(x: Tensor, group: str) -> Tensor:
    sequence, start = _GROUPS[group], time.perf_counter()
    x = x.contiguous()
    gathered = x.new_empty(sequence.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x, group=sequence.group)
    sequence.meter.add(start, x.nbytes)
    return gathered.view(sequence.size, *x.shape)


@_all_gather.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(_GROUPS[group].size, *x.shape)


@custom_op("longhaul::broadcast", mutates_args=())
def _broadcast(x: Tensor, source: int, group: str) -> Tensor:
    sequence, start = _GROUPS[group], time.perf_counter()
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, sequence.ranks[source], group=sequence.group)
    sequence.meter.add(start, x.nbytes if sequence.rank == source else 0)
    return x


# Every rank uses what the operators return, or the compiler of one rank would drop a collective
# that others wait in: that is why a shift past the end is not None.


@custom_op("longhaul::shift", mutates_args=())
def _shift(x: Tensor, outside: Tensor, step: int, group: str) -> Tensor:
    sequence, start = _GROUPS[group], time.perf_counter()
    x, received = x.contiguous(), outside.clone(memory_format=torch.contiguous_format)
    source, target = sequence.rank - step, sequence.rank + step
    operations, sends = [], 0 <= target < sequence.size
    if sends:
        operations.append(dist.P2POp(dist.isend, x, sequence.ranks[target], sequence.group))
    if 0 <= source < sequence.size:
        operations.append(dist.P2POp(dist.irecv, received, sequence.ranks[source], sequence.group))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    sequence.meter.add(start, x.nbytes if sends else 0)
    return received


@custom_op("longhaul::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, group: str) -> Tensor:
    sequence, start = _GROUPS[group], time.perf_counter()
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=sequence.group)
    # a rank's part for itself does not travel
    sequence.meter.add(start, x.nbytes - x.nbytes // sequence.size)
    return received


@_broadcast.register_fake
def _(x: Tensor, source: int, group: str) -> Tensor:
    return x.new_empty(x.shape)


@_shift.register_fake
def _(x: Tensor, outside: Tensor, step: int, group: str) -> Tensor:
    return x.new_empty(x.shape)


@_all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _remember_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _all_to_all_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """What came from a rank, its gradient goes back to."""
    return _all_to_all(grad, ctx.group), None


_all_to_all.register_autograd(_all_to_all_backward, setup_context=_remember_group)
