"""Steady and periodic gates with memories up to 1e7 tokens, and what a scan of them must give."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.scan import RECURRENCES, Exchange, Inputs, scan

EPS = 2.0**-24  # what fp32 rounds by
# minLSTM unnormalised and `linear` are given an a of their own, not its complement.
LONG = ("mingru", "minlstm", "linear-complement")


def long_inputs(name: str, memory: float, steps: int, period: int = 1, width: int = 4) -> Inputs:
    """fp32 inputs whose decay is near 1 - 1/memory at every step; gates repeat after `period`."""
    generator = torch.Generator().manual_seed(period)
    noise = torch.rand(2, period, width, generator=generator, dtype=torch.float64)
    if period == 1:
        noise[:] = 0.5
    z = 1 / (memory * (0.5 + noise[0]))
    g = 0.5 + noise[1]  # of a candidate above zero
    open_gate = torch.log(z) - torch.log1p(-z)
    if name == "mingru":
        values = [torch.cat([open_gate, g], dim=-1)]
    elif name == "minlstm":
        values = [torch.cat([-open_gate, open_gate, g], dim=-1)]
    elif name == "linear-complement":
        values = [z, z * (g + 0.5)]
    else:
        values = [1 - z, z * (g + 0.5)]
    rows = -(-steps // period)
    return tuple(x.float().repeat(rows, 1)[None, :steps].clone().requires_grad_() for x in values)


@dataclass
class Results:
    """Of a scan under fixed cotangents: what is large at every step, and what may cancel."""

    values: dict[str, Tensor]
    gradients: list[Tensor]
    parts: int

    def errors(self, exact: "Results") -> dict[str, float]:
        """Relative to each value; of the inputs' gradients to the largest of a channel.

        That of a gate is q z a (g - h), of which the difference may cancel; the candidate's, q z,
        says how large it was.
        """
        found = {
            name: float(((x.double() - exact.values[name]) / exact.values[name]).abs().max())
            for name, x in self.values.items()
        }
        for i, (got, want) in enumerate(zip(self.gradients, exact.gradients, strict=True)):
            want, error = (x.unflatten(2, (self.parts, -1)).abs() for x in (want, got - want))
            largest = want.amax(dim=(1, 2), keepdim=True)
            found[f"gradient {i}"] = float((error / largest).max())
        return found

    def shard(self, mine: slice) -> "Results":
        values = {n: x[:, mine] if n == "h" else x for n, x in self.values.items()}
        return Results(values, [x[:, mine] for x in self.gradients], self.parts)


def results(
    name: str, inputs: Inputs, steps: int, backend: str = "auto", exchange: Exchange | None = None
) -> Results:
    """`steps` of the whole sequence: every output of it counts 1 / steps, its last state 1."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    parts = RECURRENCES[name].parts
    width = inputs[-1].shape[-1] // parts
    h0 = torch.full((1, width), 0.25, dtype=wide, requires_grad=True)
    h, h_last = scan(RECURRENCES[name], inputs, h0, backend=backend, exchange=exchange)
    cotangents = [torch.full_like(h, 1 / steps), torch.ones_like(h_last)]
    grad_h0, *gradients = torch.autograd.grad([h, h_last], [h0, *inputs], cotangents)
    values = {"h": h.detach(), "h_last": h_last.detach(), "dh0": grad_h0}
    return Results(values, gradients, parts)


def exact_results(name: str, inputs: Inputs, steps: int) -> Results:
    """The same in fp64, from the very numbers that the inputs are rounded to."""
    return results(name, tuple(x.detach().double().requires_grad_() for x in inputs), steps)


def bound(memory: float, steps: int) -> float:
    """1e-6, and what conditioning takes: a decay over many memories knows its gate's rounding."""
    return 1e-6 + 4 * EPS * min(steps / memory, 50)


def closed_form(memory: float, steps: int) -> tuple[Tensor, Tensor]:
    """h [T] and dh0 of a steady mingru with z = 1 / memory in fp32, g = 1, h0 = 1/4."""
    gate = torch.tensor(math.log(1 / memory) - math.log1p(-1 / memory), dtype=torch.float32)
    rate = torch.log1p(-torch.sigmoid(gate.double()))
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    decay = torch.exp(t * rate)
    return 0.25 * decay - 1.5 * torch.expm1(t * rate), decay[-1] + decay.sum() / steps
