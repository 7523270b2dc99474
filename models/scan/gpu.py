"""The GPU backend: reduce-then-scan with the gates fused, in Triton, with chunked.py's functions.

Time is cut into chunks, and each phase runs over all of them at once:

    aggregate   every chunk's map h -> decay * h + state     reads what the gates need
    carry       the state entering each chunk                the same kernels, on the maps
    output      every chunk from its entering state          reads all inputs, writes all outputs

Where there are channels enough to fill the device, one chunk spans all steps and only the output
phase runs: the fewest bytes there can be. Runs on CUDA, or on a CPU in Triton's interpreter
(TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

import os
from typing import Any

import torch
from torch import Tensor

from models.scan import triton_kernels as kernels
from models.scan.recurrence import Inputs, Linear, Recurrence, Span

RECURRENCES_BUILT = ("linear", "mingru", "minlstm", "minlstm-unnormalized")
BLOCK = 128  # channels of a program: four to a lane, 8 bytes of bf16
CHUNKS = (512, 256, 128, 64)  # steps of a chunk: the longest that keeps the device busy
BUSY_PROGRAMS = 16384  # four waves of one-warp programs on 132 processors
SERIAL_CHANNELS = 32768  # B * H from which one chunk spans all steps
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def supports(device: str, dtype: torch.dtype) -> bool:
    """Whether the kernels take inputs of this device and dtype."""
    runs = device == "cuda" or (device == "cpu" and INTERPRETED)
    return runs and dtype in (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine; None when they can."""
    return None  # to import this module takes Triton, and `supports` asks for the device


def chunk_count(recurrence: Recurrence, inputs: Inputs) -> int:
    """How many chunk maps a span of these inputs keeps."""
    batch, steps, width = recurrence.state_shape(inputs)
    return _ceil(steps, _chunk_steps(batch, steps, width))


def summarize(recurrence: Recurrence, inputs: Inputs, reset: Tensor | None) -> Span:
    """As chunked.summarize. Reads the inputs once; keeps every chunk's map."""
    return _summarize(recurrence, inputs, None, reset, reverse=False)


def forward(
    recurrence: Recurrence,
    inputs: Inputs,
    h_in: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """As chunked.forward. Without a span it may run as one chunk."""
    return _forward(recurrence, inputs, h_in, reset, span, reverse=False)


def summarize_backward(
    recurrence: Recurrence, inputs: Inputs, grad_h: Tensor, reset: Tensor | None
) -> Span:
    """As chunked.summarize_backward. Reads the gradient and what the decay needs."""
    return _summarize(recurrence, inputs, grad_h.contiguous(), reset, reverse=True)


def backward(
    recurrence: Recurrence,
    inputs: Inputs,
    h: Tensor,
    h_in: Tensor,
    grad_h: Tensor,
    grad_out: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Inputs, Tensor]:
    """As chunked.backward; the preactivations' gradient is one tensor, like the preactivations."""
    batch, steps, width = recurrence.state_shape(inputs)
    grad_h, grad_out = grad_h.contiguous(), grad_out.contiguous()
    if span is None and not _one_chunk(batch, steps, width):
        span = summarize_backward(recurrence, inputs, grad_h, reset)
    ends, chunk = _ends(span, grad_out, steps, reverse=True)
    inputs = tuple(x.contiguous() for x in inputs)
    grads = tuple(torch.empty_like(x) for x in inputs)
    grad_h_in = torch.empty_like(grad_out)
    _launch(
        kernels.backward_kernel,
        recurrence,
        (batch, steps, width, chunk),
        reset,
        *(inputs[0], h.contiguous(), grad_h, h_in.contiguous(), ends, grad_out),
        *(grads[0], grads[-1], grad_h_in),
    )
    return grads, grad_h_in


def _summarize(
    recurrence: Recurrence,
    inputs: Inputs,
    grad_h: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> Span:
    """Of the states from left to right, or (with grad_h) of their gradient from right to left."""
    batch, steps, width = recurrence.state_shape(inputs)
    chunk = _chunk_steps(batch, steps, width)
    inputs = tuple(x.contiguous() for x in inputs)
    maps = inputs[0].new_empty(2, batch, _ceil(steps, chunk), width, dtype=torch.float32)
    _launch(
        kernels.summarize_kernel,
        recurrence,
        (batch, steps, width, chunk),
        reset,
        *(inputs[0], inputs[-1], inputs[0] if grad_h is None else grad_h, maps),
        FLOW=grad_h is not None,
        REVERSE=reverse,
    )
    if maps.shape[2] == 1:
        return Span(maps[0, :, 0].clone(), maps[1, :, 0].clone(), maps)
    whole = _summarize(Linear(), (maps[0], maps[1]), None, None, reverse)
    return Span(whole.decay, whole.state, maps)


def _forward(
    recurrence: Recurrence,
    inputs: Inputs,
    h_in: Tensor,
    reset: Tensor | None,
    span: Span | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, steps, width = recurrence.state_shape(inputs)
    h_in = h_in.contiguous()
    if span is None and not _one_chunk(batch, steps, width):
        span = _summarize(recurrence, inputs, None, reset, reverse)
    ends, chunk = _ends(span, h_in, steps, reverse)
    inputs = tuple(x.contiguous() for x in inputs)
    h = inputs[0].new_empty(batch, steps, width)
    h_last = torch.empty_like(h_in)
    _launch(
        kernels.forward_kernel,
        recurrence,
        (batch, steps, width, chunk),
        reset,
        *(inputs[0], inputs[-1], h_in, ends, h, h_last),
        REVERSE=reverse,
    )
    return h, h_last


def _ends(span: Span | None, entering: Tensor, steps: int, reverse: bool) -> tuple[Tensor, int]:
    """The state that leaves every chunk [B, N, H], and the steps of a chunk."""
    if span is None or span.chunks.shape[2] == 1:
        return entering, steps  # one chunk: nobody reads its end
    decay, state = span.chunks
    batch, _, width = decay.shape
    ends, _ = _forward(Linear(), (decay, state), entering, None, None, reverse)
    return ends, _chunk_steps(batch, steps, width)


def _one_chunk(batch: int, steps: int, width: int) -> bool:
    """Whether a device that has the whole sequence runs it as one chunk, without a carry."""
    return batch * width >= SERIAL_CHANNELS or steps <= CHUNKS[-1]


def _chunk_steps(batch: int, steps: int, width: int) -> int:
    columns = batch * _ceil(width, BLOCK)
    for chunk in CHUNKS:
        if columns * _ceil(steps, chunk) >= BUSY_PROGRAMS:
            return chunk
    return CHUNKS[-1]


def rows_at_once(kernel: Any, recurrence: Recurrence) -> int:
    """Rows whose loads are in flight together: as many as fit the registers without a spill."""
    return 4 if kernel is kernels.backward_kernel or recurrence.parts == 3 else 8


def _launch(
    kernel: Any,
    recurrence: Recurrence,
    sizes: tuple[int, int, int, int],
    reset: Tensor | None,
    *tensors: Tensor,
    **constants: bool,
) -> None:
    """Run a kernel over (B, T, H, steps of a chunk)."""
    if recurrence.name not in RECURRENCES_BUILT:
        raise ValueError(f"no GPU kernel for {recurrence.name!r}: use 'chunked'")
    batch, steps, width, chunk = sizes
    programs = batch * _ceil(steps, chunk) * _ceil(width, BLOCK)
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](
            tensors[0] if reset is None else reset.to(torch.uint8).contiguous(),
            *tensors,
            steps,
            width,
            chunk,
            RECURRENCE=recurrence.name,
            HAS_RESET=reset is not None,
            RAW=not INTERPRETED,
            UNROLL=rows_at_once(kernel, recurrence),
            BLOCK=BLOCK,
            num_warps=1,
            **constants,
        )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
