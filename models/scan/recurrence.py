"""The contract of a recurrence, and a problem: a recurrence with its inputs and resets."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.scan.span import ELEMENTWISE, Decay, Span, span_dtype
from models.segment import reset_fault

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class NativeStates:
    """A C++ source on kernels/states.h, and which inputs [B, T, N] all channels read."""

    source: Path
    shared: tuple[int, ...] = ()


class Recurrence:
    """h_t = a_t h_{t-1} + b_t from gates that see the inputs only, and an output read off it.

    A subclass says what its gates and their derivatives are, in plain torch: `chunked` and
    `reference` then run it, on one device or many. Loops over time are a backend's business; a
    kernel's loop is given the gates of `native_gates` or `triton_gates`, where there are any.

    inputs[0] is [B, T, ...]; so are the others, or they are weights that serve every step. Equal
    recurrences have equal names, others have others: dataclasses with `frozen=True` do.
    """

    name: str  # short and lower case: operators and messages know the recurrence by it
    tensors: int = 1  # inputs, where they are all [B, T, parts * H]
    weights: int = 0  # how many of the inputs, the last ones, serve every step; of any dtype
    parts: int = 1  # values of a channel, side by side in the last dimension of each input
    kind: Decay = ELEMENTWISE
    own_output: bool = False  # whether y is another thing than the state
    native_gates: tuple[Path, str] | None = None  # a C++ header, and the type in it
    native_states: "NativeStates | None" = None  # a loop in C++ for a state that is no row
    triton_states: str | None = None  # a module of kernels for such a state
    triton_gates: str | None = None  # module:name of a kernels.gates.TritonGates

    def __post_init__(self) -> None:
        """A dataclass is known when it is made: a compiler could not record it on the way."""
        remember(self)

    def faults(self, inputs: Inputs) -> str | None:
        """What is wrong with the inputs; None where nothing is."""
        if len(inputs) != self.tensors:
            return f"takes {self.tensors} inputs, got {len(inputs)}"
        if any(x.dim() != 3 or x.shape != inputs[0].shape for x in inputs):
            return f"inputs must be [B, T, ...] alike, got {_shown(inputs)}"
        if inputs[0].shape[-1] % self.parts:
            return (
                f"needs a last dimension of {self.parts} * H, got {inputs[0].shape[-1]}, "
                f"which {self.parts} does not divide"
            )
        return None

    def kernel_fault(self) -> str | None:
        """Why no kernel of ours can loop over it: they know states that are rows, and are y."""
        rows = type(self).state_shape is Recurrence.state_shape and self.kind is ELEMENTWISE
        if rows and not self.own_output:
            return None
        return f"{self.name} has a state that is not [B, H], or another output than its state"

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Of a state, [B, ...]."""
        return inputs[0].shape[0], inputs[0].shape[-1] // self.parts

    def decay_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Of a step's decay, [B, ...]."""
        return self.state_shape(inputs)

    def state_dtype(self, inputs: Inputs) -> torch.dtype:
        """States, carries and accumulators are fp32 whatever the inputs; fp64 stays fp64."""
        return torch.float64 if inputs[0].dtype == torch.float64 else torch.float32

    def output_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Of y, [B, T, ...]."""
        batch, *state = self.state_shape(inputs)
        return batch, inputs[0].shape[1], *state

    def define(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The gates as they are written down, where `gates` is a form that computes better."""
        return self.gates(inputs)

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """a [B, T, ...], b [B, T, ...] in the state's dtype, from inputs in any."""
        raise NotImplementedError

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        """Gradients of the inputs, in their dtypes, through the gates."""
        raise NotImplementedError

    def output(self, inputs: Inputs, h: Tensor) -> Tensor:
        """y [B, T, ...] from the states h [B, T, ...] after each step; linear in h."""
        return h

    def state_gradient(self, inputs: Inputs, grad_y: Tensor) -> Tensor:
        """The gradient of h, [B, T, ...], from that of y."""
        return grad_y

    def output_gradients(
        self, inputs: Inputs, h: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs through the output, None where it does not read one."""
        return (None,) * len(inputs)


def usable(state: Tensor) -> Tensor:
    """A state that autograd can keep: one that was made in inference mode is copied out of it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return state
    return state.clone() if state.is_inference() else state


# Recurrences by name: operators take no objects.
KNOWN: dict[str, Recurrence] = {}


def remember(recurrence: Recurrence) -> None:
    """Know it by its name from here on. Raises ValueError where another one has that name."""
    if recurrence.name not in KNOWN:
        KNOWN[recurrence.name] = recurrence
    elif KNOWN[recurrence.name] != recurrence:
        raise ValueError(
            f"two recurrences are named {recurrence.name!r}: give them names of their own "
            f"(or, if they are the same, make the class a dataclass with frozen=True)"
        )


@dataclass(frozen=True)
class Problem:
    """What there is to scan: a recurrence over inputs, cleared before steps that `reset` marks.

    reset [B, T] bool or uint8, or None. A reset at t clears the state before step t, whatever it
    was: its decay is zero, and a decay of zero lets nothing through.
    """

    recurrence: Recurrence
    inputs: Inputs
    reset: Tensor | None = None

    def part(self, begin: int, end: int) -> "Problem":
        """Its steps [begin, end)."""
        count = len(self.inputs) - self.recurrence.weights
        stepped = tuple(x[:, begin:end] for x in self.inputs[:count])
        reset = None if self.reset is None else self.reset[:, begin:end]
        return Problem(self.recurrence, (*stepped, *self.inputs[count:]), reset)

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def steps(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.recurrence.state_shape(self.inputs)

    @property
    def width(self) -> int:
        """Channels of a state that is a row of them, [B, H]."""
        return self.state_shape[-1]

    def cleared(self, a: Tensor) -> Tensor:
        """a [B, T, ...], zero at resets."""
        if self.reset is None:
            return a
        return a.masked_fill(self.reset.bool().view(*self.reset.shape, *[1] * (a.dim() - 2)), 0.0)

    def new_state(self) -> Tensor:
        """An uninitialised state."""
        return self.inputs[0].new_empty(
            self.state_shape, dtype=self.recurrence.state_dtype(self.inputs)
        )

    def new_span(self) -> Span:
        """An uninitialised span of all steps."""
        dtype = span_dtype(self.recurrence.state_dtype(self.inputs))
        decay_shape = self.recurrence.decay_shape(self.inputs)
        decay = self.inputs[0].new_empty(decay_shape, dtype=dtype)
        state = self.inputs[0].new_empty(self.state_shape, dtype=dtype)
        return Span(decay, state, kind=self.recurrence.kind)

    def new_output(self) -> Tensor:
        """An uninitialised y, in the inputs' dtype."""
        return self.inputs[0].new_empty(self.recurrence.output_shape(self.inputs))

    def entering(self, h0: Tensor | None) -> Tensor:
        """The state that enters, zeros without one. Raises ValueError for what does not fit."""
        if fault := self._fault(h0):
            raise ValueError(fault)
        dtype = self.recurrence.state_dtype(self.inputs)
        if h0 is None:
            return self.inputs[0].new_zeros(self.state_shape, dtype=dtype)
        return usable(h0).to(dtype)

    def _fault(self, h0: Tensor | None) -> str | None:
        name, inputs, reset = self.recurrence.name, self.inputs, self.reset
        first = inputs[0]
        stepped = inputs[: len(inputs) - self.recurrence.weights]
        if first.dim() < 2 or any(x.dtype != first.dtype for x in stepped):
            return f"{name} scan inputs must be [B, T, ...] alike, got {_shown(inputs)}"
        if not (first.is_floating_point() or first.is_complex()):
            return f"{name} scan inputs must be float, got {first.dtype}"
        if fault := self.recurrence.faults(inputs):
            return f"{name} scan {fault}"
        are_complex = any(x.is_complex() for x in (*stepped, h0) if x is not None)
        if are_complex and not self.recurrence.state_dtype(inputs).is_complex:
            return f"{name} scan has a real state, and inputs or h0 are complex: give real ones"
        if 0 in (self.steps, *self.state_shape[1:]):
            sizes = f"got T = {self.steps}, H = {self.state_shape[-1]}"
            return f"{name} scan needs at least one step and one channel, {sizes}"
        devices = {x.device for x in (*inputs, h0, reset) if x is not None}
        if len(devices) > 1:
            shown = " and ".join(sorted(str(device) for device in devices))
            return f"{name} scan needs all tensors on one device, got {shown}"
        if reset is not None and (fault := reset_fault(reset, *first.shape[:2])):
            return fault
        if h0 is not None and h0.shape != self.state_shape:
            axes = "[B, H]" if len(self.state_shape) == 2 else "[B, ...]"
            return f"h0 must be {axes} = {list(self.state_shape)}, got {tuple(h0.shape)}"
        return None


def _shown(inputs: Inputs) -> str:
    return ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
