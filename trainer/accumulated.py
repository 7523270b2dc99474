"""The gradients that a step has gathered so far, where DeepSpeed keeps them at each ZeRO stage.

At stages 0 and 1 every rank has its own sum, parameter by parameter; at 2 and 3 the ranks have sums
of all of them, each of its own part. Every rank's share is read, and put back as it was.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Share = list[Tensor | None]


def read(engine: Any, stage: int) -> Share:
    """This rank's share, copied to the CPU; None where nothing has come yet."""
    share = {0: _of_parameters, 1: _of_parameters, 2: _of_partitions, 3: _of_flat_buffer}
    return [x if x is None else x.detach().to("cpu", copy=True) for x in share[stage](engine)]


def put(engine: Any, stage: int, share: Share) -> None:
    """Into an engine of the same model, stage and world that has done no backward since a step."""
    device = next(engine.module.parameters()).device
    there = [x if x is None else x.to(device) for x in share]
    if all(x is None for x in there):
        return
    take: dict[int, Callable[[Any, Share], None]] = {
        0: _put_parameters,
        1: _put_parameters,
        2: _put_partitions,
        3: _put_flat_buffer,
    }
    take[stage](engine, there)


def _place(engine: Any) -> str:
    """The attribute of a parameter: apart from its gradient where sums are wider than that."""
    apart = getattr(engine.optimizer, "use_grad_accum_attribute", False)
    return "grad_accum" if apart else "grad"


def _of_parameters(engine: Any) -> Share:
    return [getattr(p, _place(engine)) for p in engine.module.parameters()]


def _put_parameters(engine: Any, share: Share) -> None:
    for parameter, gradient in zip(engine.module.parameters(), share, strict=True):
        if gradient is not None and _place(engine) == "grad":
            gradient = gradient.to(parameter.grad_dtype or parameter.dtype)  # as others saved it
        setattr(parameter, _place(engine), gradient)


def _of_partitions(engine: Any) -> Share:
    """Flat in a buffer of their own where sums are wider than gradients, else one by one."""
    optimizer = engine.optimizer
    share: Share = []
    for group, parameters in enumerate(optimizer.params_in_partition):
        if optimizer._use_compact_grad_partition_buffer(group):
            buffer = optimizer.averaged_gradients.get(group)
            share.append(buffer and buffer.flat_partition)
        else:
            share += optimizer.all_grad_tensors.get(group) or [None] * len(parameters)
    return share


def _put_partitions(engine: Any, share: Share) -> None:
    optimizer, left = engine.optimizer, list(share)
    for group, parameters in enumerate(optimizer.params_in_partition):
        if optimizer._use_compact_grad_partition_buffer(group):
            buffer = optimizer._build_compact_grad_partition_buffer(group)
            buffer.flat_partition.copy_(left.pop(0))
            optimizer.averaged_gradients[group] = buffer
        else:
            mine, left = left[: len(parameters)], left[len(parameters) :]
            optimizer.all_grad_tensors[group] = mine
    assert not left


def _of_flat_buffer(engine: Any) -> Share:
    optimizer = engine.optimizer
    # what lies there before a step's first backward is of the step before
    begun = optimizer.micro_step_id > 0 or optimizer._epilogue_ran_this_backward
    return [optimizer.grad_partitions_flat_buffer if begun else None]


def _put_flat_buffer(engine: Any, share: Share) -> None:
    (flat,) = share
    engine.optimizer.grad_partitions_flat_buffer.copy_(flat)
    engine.optimizer.micro_step_id = 1  # what comes is added to it
