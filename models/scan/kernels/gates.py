"""What a loop in Triton is given of a recurrence. Imports no Triton."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TritonGates:
    """Three Triton functions of the values x0, x1, x2 of a channel, and which of them they read.

    decay(x0, x1, RAW) -> a, c;  gates(x0, x1, x2, RAW) -> a, c, b of h = a * h + b, c = 1 - a;
    backward(q, previous, x0, x1, x2, RAW) -> a, c and the gradients of the three values, q being
    the gradient of h. c is made of the gates: from an a near one nothing of it is left. A
    recurrence of fewer values is given its last one again in place of others.
    """

    decay: Any
    gates: Any
    backward: Any
    values: int  # of a channel: one to three, of inputs of their own at most two
    separate: bool = False  # whether they are inputs of their own, and not parts of one
    decay_reads: int = 1  # the first so many values
    backward_reads: int = 3
