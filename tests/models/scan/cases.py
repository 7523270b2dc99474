"""Recurrences with random inputs, shared by the tests of both levels of the scan."""

import torch
from torch import Tensor

from models import scan as shipped
from models.scan import Inputs, Recurrence, scan

# Those whose states are rows [B, H] and are the output; and the others.
RECURRENCES = {name: r for name, r in shipped.RECURRENCES.items() if not r.own_output}
STATES = {name: r for name, r in shipped.RECURRENCES.items() if r.own_output}

# What runs where: kernels take the recurrences that have gates for them.
NATIVE = [name for name, recurrence in RECURRENCES.items() if recurrence.native_gates]
TRITON = [name for name, recurrence in RECURRENCES.items() if recurrence.triton_gates]
ON_CPU = [*((name, "native") for name in NATIVE), *((name, "chunked") for name in RECURRENCES)]


def make_inputs(
    recurrence: Recurrence, batch: int, steps: int, width: int, dtype: torch.dtype, shift: float = 0
) -> Inputs:
    """Random leaves. `shift` moves the preactivations: +8 keeps (a -> 1), -8 forgets (a -> 0)."""

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    def noise(parts: int) -> Tensor:
        return torch.randn(batch, steps, parts * width, dtype=torch.float64)

    if recurrence.name == "linear":
        return leaf(torch.sigmoid(noise(1) + shift)), leaf(noise(1))
    if recurrence.name == "linear-complement":
        return leaf(torch.sigmoid(-noise(1) - shift)), leaf(noise(1))
    if recurrence.name == "mingru":
        kv = noise(2)
        kv[..., :width] -= shift
        return (leaf(kv),)
    inputs = [noise(recurrence.parts) for _ in range(recurrence.tensors)]
    inputs[0][..., :width] += shift  # minLSTM's forget gate; what else is first in others
    return tuple(leaf(x) for x in inputs)


def state_inputs(
    recurrence: Recurrence, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> Inputs:
    """Random leaves of a recurrence of STATES for (B, T, D, N); weights in fp32 or fp64."""
    batch, steps, width, states = sizes
    wide = torch.promote_types(dtype, torch.float32)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x = noise(batch, steps, width).to(dtype)
    if recurrence.name == "s4d":
        rate = torch.complex(-0.1 * torch.rand(width, states).double(), noise(width, states))
        weight = torch.complex(noise(width, states), noise(width, states))
        made = x, *(w.to(torch.promote_types(wide, torch.complex64)) for w in (rate, weight))
    else:
        stepped = [noise(batch, steps, n).to(dtype) for n in (width, states, states)]
        weights = -4 * torch.rand(width, states).double(), noise(width) - 3
        made = x, *stepped, *(w.to(wide) for w in weights)
    return tuple(each.requires_grad_() for each in made)


def make_reset(batch: int, steps: int, where: str) -> Tensor | None:
    """Reset masks [B, T]: none, at 0, at every multiple of sqrt(T) and its neighbours, random."""
    if where == "none":
        return None
    reset = torch.zeros(batch, steps, dtype=torch.uint8)
    if where == "start":
        reset[:, 0] = 1
    elif where == "edges":
        chunk = max(1, int(steps**0.5))
        for row in range(batch):
            reset[row, (chunk * (row + 1)) % steps] = 1
            reset[row, (chunk * (row + 1) - 1) % steps] = 1
        reset[0, -1] = 1
    else:
        reset[torch.rand(batch, steps) < 0.1] = 1
    return reset


def outputs_and_gradients(
    recurrence: Recurrence, inputs: Inputs, h0: Tensor, reset: Tensor | None, backend: str
) -> list[Tensor]:
    """h, h_last and the gradients of h0 and every input under a fixed random cotangent."""
    h, h_last = scan(recurrence, inputs, h0, reset=reset, backend=backend)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (h, h_last)
    ]
    return [h, h_last, *torch.autograd.grad([h, h_last], [h0, *inputs], cotangents)]
