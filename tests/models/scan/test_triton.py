"""The GPU kernels: on the GPU where there is one, else in Triton's interpreter and its compiler."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.scan import Problem, backend, scan
from tests.models.scan.cases import (
    RECURRENCES,
    STATES,
    TRITON,
    make_inputs,
    make_reset,
    outputs_and_gradients,
    state_inputs,
)

pytest.importorskip("triton")
gpu = importlib.import_module("models.scan.triton")
triton_states = importlib.import_module("models.scan.triton_states")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    where: str = "none",
    shift: float = 0.0,
    tolerance: float = 2e-5,
) -> None:
    """Values and all gradients against the loop in fp64, on the same rounded inputs."""
    recurrence, (batch, steps, width) = RECURRENCES[name], shape
    torch.manual_seed(steps)
    inputs = tuple(
        x.detach().to(DEVICE).requires_grad_()
        for x in make_inputs(recurrence, batch, steps, width, dtype, shift)
    )
    h0 = torch.randn(batch, width, device=DEVICE, requires_grad=True)
    reset = make_reset(batch, steps, where)
    reset = None if reset is None else reset.to(DEVICE)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact_h0 = h0.detach().double().requires_grad_()
    expected = outputs_and_gradients(recurrence, exact, exact_h0, reset, "reference")
    actual = outputs_and_gradients(recurrence, inputs, h0, reset, "triton")
    state = torch.float32
    assert [x.dtype for x in actual] == [dtype, state, state, *(dtype for _ in inputs)]
    for got, want in zip(actual, expected, strict=True):
        assert (got.double() - want).norm() <= tolerance * want.norm()


def cut(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Chunks of so many steps, at every level of the carry."""
    monkeypatch.setattr(gpu, "CHUNKS", (steps,))


@pytest.mark.parametrize("where", ["none", "edges"])
@pytest.mark.parametrize(("steps", "chunk"), [(1, 64), (13, 4)])
@pytest.mark.parametrize("name", TRITON)
def test_equals_definition(name, steps, chunk, where, monkeypatch):
    """Chunks that T is no multiple of, rows and channels that no group divides."""
    cut(monkeypatch, chunk)
    compare(name, (2, steps, 130), torch.float32, where, shift=steps % 3 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear-complement", "minlstm"])
def test_equals_definition_in_chunks_as_long_as_on_a_gpu(name, monkeypatch):
    """Of fewest values, and of most."""
    cut(monkeypatch, 64)
    compare(name, (2, 70, 130), torch.float32, "edges")


@pytest.mark.slow
def test_maps_of_maps_of_chunks(monkeypatch):
    cut(monkeypatch, 4)
    compare("linear", (1, 150, 20), torch.float32, "random")
    compare("mingru", (1, 75, 20), torch.float32, "random")


@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize("shift", [8, -8])
def test_gates_at_their_ends(name, shift):
    compare(name, (1, 40, 20), torch.float32, shift=shift, tolerance=1e-4)


@pytest.mark.parametrize("name", TRITON)
def test_bf16_keeps_fp32_state(name):
    compare(name, (1, 70, 48), torch.bfloat16, "edges", shift=2, tolerance=1e-2)


@pytest.mark.parametrize("name", TRITON)
def test_one_chunk_where_channels_fill_the_device(name, monkeypatch):
    """The serial form: no aggregate pass."""
    monkeypatch.setattr(gpu, "SERIAL_CHANNELS", 1)
    monkeypatch.setattr(gpu, "_summarize", None)
    compare(name, (1, 37, 20), torch.float32, "random")


@pytest.mark.parametrize("name", TRITON)
def test_spans_compose_like_the_chunked_form(name, monkeypatch):
    """summarize and summarize_backward, which the exchange between devices uses."""
    cut(monkeypatch, 8)
    recurrence = RECURRENCES[name]
    inputs = tuple(x.detach().to(DEVICE) for x in make_inputs(recurrence, 2, 30, 20, torch.float32))
    reset = make_reset(2, 30, "edges")
    grad_h = torch.randn(2, 30, 20, device=DEVICE)
    for mask in (None, reset.to(DEVICE)):
        problem = Problem(recurrence, inputs, mask)
        for got, want in (
            [backend.summarize(b, problem) for b in ("triton", "chunked")],
            [backend.summarize_backward(b, problem, grad_h) for b in ("triton", "chunked")],
        ):
            torch.testing.assert_close(got.decay, want.decay, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got.state, want.state, rtol=1e-4, atol=1e-5)
            assert got.kept[0].shape == gpu.empty(problem)[0].kept[0].shape == (2, 2, 4, 20)


def test_nan_is_not_hidden():
    for name in TRITON:
        recurrence = RECURRENCES[name]
        inputs = make_inputs(recurrence, 1, 40, 20, torch.float32)
        inputs = tuple(x.detach().to(DEVICE) for x in inputs)
        for x in inputs:
            x[0, 7, :] = float("nan")
        h, _ = scan(recurrence, inputs, backend="triton")
        assert h[0, :7].isfinite().all(), name
        assert h[0, 7:].isnan().all(), name


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", TRITON)
def test_a_reset_clears_what_is_not_finite(name, bad, monkeypatch):
    """In a chunk and in the maps of chunks; what entered, too."""
    cut(monkeypatch, 8)
    made = make_inputs(RECURRENCES[name], 1, 40, 20, torch.float32)
    inputs = [x.detach().to(DEVICE) for x in made]
    reset = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    reset[:, 17] = True
    clean, _ = scan(RECURRENCES[name], tuple(inputs), reset=reset, backend="triton")
    for x in inputs:
        x[:, 3:9] = bad
    h0 = torch.full((1, 20), bad, device=DEVICE)
    h, _ = scan(RECURRENCES[name], tuple(inputs), h0, reset=reset, backend="triton")
    assert not h[:, :17].isfinite().all()
    torch.testing.assert_close(h[:, 17:], clean[:, 17:])


def test_decays_above_one_leave_zero_what_is_zero(monkeypatch):
    """A chunk's decay, 1e30 to the fourth, is no number of fp32."""
    cut(monkeypatch, 4)
    a, b = torch.full((1, 14, 20), 1e30, device=DEVICE), torch.zeros(1, 14, 20, device=DEVICE)
    h, h_last = scan(RECURRENCES["linear"], (a, b), backend="triton")
    assert not h.any()
    assert not h_last.any()


@pytest.mark.parametrize("name", STATES)
def test_a_reset_clears_a_state_that_nothing_wears_down(name, monkeypatch):
    """A rate of zero, of which an infinite sum is no number, in a chunk and in the carry."""
    monkeypatch.setattr(triton_states, "TILE", 4)
    monkeypatch.setattr(triton_states, "CHUNKS", 2)
    inputs = [x.detach() for x in state_inputs(STATES[name], (1, 19, 17, 3), torch.float32)]
    for weights in inputs[-2:-1]:  # S4D's rate and Mamba's A
        weights.zero_()
    h0 = torch.randn(1, 17, 3, dtype=STATES[name].state_dtype(tuple(inputs)))
    reset = make_reset(1, 19, "random")
    given = [x.to(DEVICE) for x in (*inputs, h0, reset)]
    got = scan(STATES[name], tuple(given[:-2]), given[-2], reset=given[-1], backend="triton")
    want = scan(STATES[name], tuple(given[:-2]), given[-2], reset=given[-1], backend="chunked")
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "parts", "told"),
    [(1, 1, None), (1, 3, None), (2, 1, None), (3, 1, "take three of one"), (2, 2, "take three")],
)
def test_gates_that_the_loops_cannot_run_are_refused(tensors, parts, told, monkeypatch):
    """And those of one value read no other."""
    recurrence: Any = SimpleNamespace(name="own", tensors=tensors, parts=parts)
    recurrence.triton_states, recurrence.triton_gates = None, "somewhere"
    recurrence.kernel_fault = lambda: None
    values, separate = tensors * parts, tensors > 1
    gates = gpu.TritonGates(None, None, None, values, separate)
    monkeypatch.setattr(gpu, "gates_of", lambda _: gates)
    fault = gpu.fault(recurrence, "cuda", torch.float32)
    assert told in fault if told else fault is None
    used = gpu.constants(gpu.loops.backward_kernel, gates, torch.float32)
    assert used["BACKWARD_READS"] == min(3, values)
    assert used["UNROLL"] >= 1


@pytest.mark.parametrize("where", ["none", "random"])
@pytest.mark.parametrize("name", STATES)
def test_states_equal_the_definition(name, where, monkeypatch):
    """States [B, D, N]: several chunks of several tiles; channels and states that fill no block."""
    monkeypatch.setattr(triton_states, "TILE", 4)
    monkeypatch.setattr(triton_states, "CHUNKS", 2)
    recurrence, sizes = STATES[name], (1, 19, 17, 3)
    inputs = state_inputs(recurrence, sizes, torch.float32)
    inputs = tuple(x.detach().to(DEVICE).requires_grad_() for x in inputs)
    shape, dtype = recurrence.state_shape(inputs), recurrence.state_dtype(inputs)
    h0 = torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)
    reset = make_reset(1, 19, where)
    reset = None if reset is None else reset.to(DEVICE)

    def wide(x: torch.Tensor) -> torch.Tensor:
        exact = torch.complex128 if x.is_complex() else torch.float64
        return x.detach().to(exact).requires_grad_()

    exact = tuple(map(wide, inputs))
    expected = outputs_and_gradients(recurrence, exact, wide(h0), reset, "reference")
    actual = outputs_and_gradients(recurrence, inputs, h0, reset, "triton")
    for got, want in zip(actual, expected, strict=True):
        worst = (got.to(want.dtype) - want).abs().max()
        assert worst <= 2e-6 * max(1e-3, want.abs().max())
    problem = Problem(recurrence, tuple(x.detach() for x in inputs), reset)
    grad_y = torch.randn(1, 19, 17, device=DEVICE)
    for got, want in (
        [backend.summarize(b, problem) for b in ("triton", "chunked")],
        [backend.summarize_backward(b, problem, grad_y) for b in ("triton", "chunked")],
    ):
        torch.testing.assert_close(got.decay, want.decay, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.state, want.state, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, and has never run on one")
def test_more_than_2_to_the_31_elements():
    """T * H beyond 32 bits: the last steps are where an overflowing offset would show."""
    steps, width = 2**20 + 3, 2048
    kv = torch.zeros(1, steps, 2 * width, dtype=torch.bfloat16, device=DEVICE)
    kv[:, -64:] = torch.randn(1, 64, 2 * width, device=DEVICE)
    h, _ = scan(RECURRENCES["mingru"], (kv,), backend="triton")
    tail, _ = scan(RECURRENCES["mingru"], (kv[:, -4096:],), backend="chunked")
    torch.testing.assert_close(h[:, -64:], tail[:, -64:], rtol=2e-2, atol=2e-2)


class LastProgram:
    """A kernel of which the last program runs alone, in the interpreter."""

    def __init__(self, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.monkeypatch, self.arg_names = kernel, monkeypatch, kernel.arg_names

    def __getitem__(self, grid: tuple[int]) -> Any:
        from triton.runtime.interpreter import interpreter_builder as builder

        def to_the_last(x: int, y: int, z: int) -> None:
            builder.grid_idx = (grid[0] - 1, y, z)

        def run(*tensors: torch.Tensor, **settings: Any) -> None:
            with self.monkeypatch.context() as patched:
                patched.setattr(builder, "set_grid_idx", to_the_last)
                self.kernel[(1,)](*tensors, **settings)

        return run


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU all programs run: above")
@pytest.mark.parametrize("name", ["mingru", "linear"])
def test_the_last_offsets_of_more_than_2_to_the_31_elements(name, monkeypatch):
    """The end of a tensor of 2^32 elements, of which memory is taken for that end alone."""
    recurrence, (batch, steps, width, end) = RECURRENCES[name], (2, 2**19 + 40, 2048, 30)
    cut(monkeypatch, 64)
    for kernel in ("summarize_kernel", "forward_kernel", "backward_kernel"):
        last = LastProgram(getattr(gpu.loops, kernel), monkeypatch)
        monkeypatch.setattr(gpu.loops, kernel, last)
    # what is not written takes no memory
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def sparse(like: torch.Tensor) -> torch.Tensor:
        """As long as all steps; what `like` [B, 64, width] has is at the end."""
        whole = like.new_empty(batch, steps, like.shape[-1])
        whole[1, -64:] = like[1]
        return whole

    tail = tuple(x.detach() for x in make_inputs(recurrence, batch, 64, width, torch.bfloat16, 0.0))
    grad_y, grad_out = torch.randn(batch, 64, width).bfloat16(), torch.randn(batch, width)
    found = []
    for kind, inputs, grad in (
        ("triton", tuple(map(sparse, tail)), sparse(grad_y)),
        ("chunked", tail, grad_y),
    ):
        problem = Problem(recurrence, inputs)
        scanned = backend.forward(kind, problem, problem.entering(None), None)
        gradients, _ = backend.backward(kind, problem, scanned, (grad, grad_out), None)
        each = (x.unflatten(-1, (-1, width)) for x in (scanned.y, *gradients))
        found.append([x[1, -end:, :, -gpu.BLOCK :] for x in each])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_ahead_without_spills(capability):
    """No GPU needed: registers and spills of every kernel as it would run in bf16."""
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    usage = json.loads(done.stdout.splitlines()[-1])
    assert len(usage) == len(TRITON) * (3 + 2) + 2 + len(STATES) * 4
    for kernel, figures in usage.items():
        if "states" in kernel:  # in fp64, with the stack of its sine; loads of single numbers
            assert figures["spilled_bytes"] <= 40 * ("s4d" in kernel), (kernel, figures)
            continue
        assert figures["spilled_bytes"] == 0, (kernel, figures)
        assert figures["registers"] <= 168, (kernel, figures)  # twelve warps to a processor
        assert figures["narrowest_load"] >= 64, (kernel, figures)  # four bf16 to a lane
