"""What bench_scan times: a pass of ours, and the same of every peer that can do it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan import RECURRENCES, Inputs, Problem, scan
from models.scan import backend as backends
from models.scan.recurrences.mingru.log_space import mingru_log_space

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Run = Callable[[], Any]


@dataclass
class Case:
    """One recurrence on one shape, with everything that a pass may read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        batch, steps, width = self.shape
        self.recurrence = RECURRENCES[self.name]
        parts = [self.recurrence.parts * width] * self.recurrence.tensors
        inputs = [torch.randn(batch, steps, n, device=DEVICE) for n in parts]
        if self.recurrence.tensors == 2:  # decays, or their complements
            inputs[0].sigmoid_()
        self.inputs: Inputs = tuple(x.to(self.dtype).requires_grad_() for x in inputs)
        self.h_in = torch.zeros(batch, width, device=DEVICE)
        self.grad_h = torch.randn(self.shape, device=DEVICE).to(self.dtype)

    def bytes_moved(self, which: str) -> int:
        """Of a pass that reads its inputs once and writes its outputs once."""
        inputs = sum(x.nbytes for x in self.inputs)
        forward = inputs + self.grad_h.nbytes  # h is as large as its gradient
        read = self.inputs[0].nbytes + 2 * self.grad_h.nbytes  # of "linear" a alone
        backward = read + inputs
        return {"forward": forward, "backward": backward}.get(which, forward + backward)


def ours(case: Case, which: str, backend: str) -> Run:
    problem = Problem(case.recurrence, tuple(x.detach() for x in case.inputs))
    if which == "forward":
        return lambda: backends.forward(backend, problem, case.h_in)
    if which == "backward":
        h = backends.forward(backend, problem, case.h_in).y
        entered = backends.Scanned(h, case.h_in)
        grads = (case.grad_h, torch.zeros_like(case.h_in))
        return lambda: backends.backward(backend, problem, entered, grads)
    return _with_gradient(case, lambda *x: scan(case.recurrence, x, case.h_in, backend=backend)[0])


def _with_gradient(case: Case, forward: Callable[..., Tensor]) -> Run:
    return lambda: torch.autograd.grad(forward(*case.inputs), case.inputs, case.grad_h)


def _peer(case: Case, which: str, forward: Callable[..., Tensor]) -> Run | None:
    """A peer that torch differentiates: its backward cannot be timed alone."""
    if which == "forward":
        return torch.no_grad()(lambda: forward(*case.inputs))
    return _with_gradient(case, forward) if which == "forward+backward" else None


def log_space(case: Case, which: str) -> Run | None:
    """The paper's parallel form, with plain torch."""
    if case.name != "mingru" or case.dtype != torch.float32:
        return None
    return _peer(case, which, lambda kv: mingru_log_space(kv)[0])


def mingru_pytorch(case: Case, which: str) -> Run | None:
    """minGRU-pytorch from PyPI, without its projections: the gates and its scan."""
    package = import_module("minGRU_pytorch.minGRU")
    if case.name != "mingru" or case.dtype != torch.float32:
        return None

    def forward(kv: Tensor) -> Tensor:
        gate, hidden = kv.chunk(2, dim=-1)
        values = -F.softplus(-gate) + package.log_g(hidden)
        return package.heinsen_associative_scan_log(-F.softplus(gate), values)

    return _peer(case, which, forward)


def pararnn(case: Case, which: str) -> Run | None:
    """pararnn-torch's diagonal scan, of which each iteration of its Newton's method is one."""
    scan_diag = import_module("pararnn.solvers.scan").scan_diag
    if case.name != "linear" or case.dtype != torch.float32:
        return None
    on = "triton" if DEVICE == "cuda" else "eager"
    return _peer(case, which, lambda a, b: scan_diag(a, b, backend=on))


def chunk_hgrn(case: Case, which: str) -> Run | None:
    """flash-linear-attention's chunked kernel; gates given as logarithms."""
    function = import_module("fla.ops.hgrn").chunk_hgrn
    return _log_gated(case, which, lambda log_a, b: function(b, log_a)[0])


def fused_recurrent_hgrn(case: Case, which: str) -> Run | None:
    """flash-linear-attention's sequential kernel; gates given as logarithms."""
    function = import_module("fla.ops.hgrn").fused_recurrent_hgrn
    return _log_gated(case, which, lambda log_a, b: function(b, log_a)[0])


def accelerated_scan(case: Case, which: str) -> Run | None:
    """accelerated-scan's warp kernel, in its own layout [B, H, T]."""
    function = import_module("accelerated_scan.warp").scan
    if case.name != "linear":
        return None
    a, b = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in case.inputs)
    grad = case.grad_h.transpose(1, 2).contiguous()
    if which == "forward":
        return torch.no_grad()(lambda: function(a, b))
    if which == "backward":
        return None
    return lambda: torch.autograd.grad(function(a, b), (a, b), grad)


def selective_scan(case: Case, which: str) -> Run | None:
    """mamba's kernel with a state of one; it has its own exponential in front."""
    function = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    if case.name != "linear":
        return None
    b = case.inputs[1].detach().transpose(1, 2).contiguous().requires_grad_()
    delta = torch.rand_like(b)
    A = -torch.ones(b.shape[1], 1, device=DEVICE)
    ones = torch.ones(b.shape[0], 1, b.shape[2], device=DEVICE, dtype=b.dtype)
    grad = case.grad_h.transpose(1, 2).contiguous()
    if which == "forward":
        return torch.no_grad()(lambda: function(b, delta, A, ones, ones))
    if which == "backward":
        return None
    return lambda: torch.autograd.grad(function(b, delta, A, ones, ones), b, grad)


def _log_gated(case: Case, which: str, forward: Callable[..., Tensor]) -> Run | None:
    """A peer of "linear" that wants log a, which is made beforehand."""
    if case.name != "linear" or which == "backward":
        return None
    leaves = (case.inputs[0].detach().log().requires_grad_(), case.inputs[1])
    if which == "forward":
        return torch.no_grad()(lambda: forward(*leaves))
    return lambda: torch.autograd.grad(forward(*leaves), leaves, case.grad_h)


PEERS: dict[str, Callable[[Case, str], Run | None]] = {
    "log-space": log_space,
    "minGRU-pytorch": mingru_pytorch,
    "pararnn-torch": pararnn,
}
GPU_PEERS: dict[str, Callable[[Case, str], Run | None]] = {
    "FLA chunk_hgrn": chunk_hgrn,
    "FLA fused_recurrent_hgrn": fused_recurrent_hgrn,
    "accelerated-scan": accelerated_scan,
    "mamba selective_scan": selective_scan,
}
if DEVICE == "cuda":
    PEERS |= GPU_PEERS
