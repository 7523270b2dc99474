"""Mamba's selective scan and S4D on a CPU, beside their peers and the memory limit.

    python -m tests.benchmarks.bench_states [--quick]

Peers: `chunked`; of mamba the authors' reference, `selective_scan_ref` of mamba_ssm, written down
again (their kernel needs CUDA), which is what transformers runs here; of S4D the convolution by FFT
that S4 is known for. Every one is first held to the chunked form. A share is the bytes of inputs
read and outputs written once, over time, over torch.add's bytes per second in the same run: these
scans compute 16 and 32 states for every number that they read, so it says how far that is from
free.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan import Inputs, Recurrence, scan
from models.scan.recurrences.mamba import Mamba
from models.scan.recurrences.s4d import S4D
from tests.benchmarks import results
from tests.models.scan.cases import state_inputs
from trainer.memory import keep_freed_memory

CASES: list[tuple[Recurrence, tuple[int, int, int, int]]] = [
    (Mamba(), (1, 16384, 512, 16)),
    (Mamba(), (8, 2048, 512, 16)),
    (S4D(), (1, 16384, 256, 32)),
    (S4D(), (8, 2048, 256, 32)),
]
QUICK: list[tuple[Recurrence, tuple[int, int, int, int]]] = [
    (Mamba(), (1, 256, 32, 16)),
    (S4D(), (1, 256, 32, 32)),
]
Forward = Callable[..., Tensor]


def selective_scan_ref(
    x: Tensor, k: Tensor, b: Tensor, c: Tensor, rate: Tensor, bias: Tensor
) -> Tensor:
    """The authors' reference: everything expanded to [B, T, D, N], then step by step."""
    delta = F.softplus(k + bias)
    decay = torch.exp(delta.unsqueeze(-1) * rate)
    held = (delta * x).unsqueeze(-1) * b.unsqueeze(2)
    h, rows = torch.zeros_like(decay[:, 0]), []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + held[:, t]
        rows.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    return torch.stack(rows, dim=1)


def fft_convolution(x: Tensor, rate: Tensor, weight: Tensor) -> Tensor:
    """S4's way: the kernel of all T steps, and a convolution by FFT; no state in or out."""
    steps = x.shape[1]
    powers = torch.exp(rate.unsqueeze(-1) * torch.arange(steps))
    kernel = 2 * torch.einsum("dn,dnt->dt", weight, powers).real
    both = torch.fft.rfft(x.mT, 2 * steps) * torch.fft.rfft(kernel, 2 * steps)
    return torch.fft.irfft(both, 2 * steps)[..., :steps].mT


PEERS = {"mamba": ("selective_scan_ref", selective_scan_ref), "s4d": ("FFT", fft_convolution)}


def _passes(forward: Forward, inputs: Inputs, grad: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    start = time.perf_counter()
    y = forward(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(y, inputs, grad)
    return middle - start, time.perf_counter() - middle


def _limit(count: int) -> float:
    """Bytes per second of torch.add over so many numbers."""
    a, b, out = (torch.rand(count) for _ in range(3))
    start = time.perf_counter()
    torch.add(a, b, out=out)
    return 3 * out.nbytes / (time.perf_counter() - start)


def measured(
    recurrence: Recurrence, sizes: tuple[int, int, int, int], repeats: int
) -> list[dict[str, Any]]:
    """A row for each contender; SystemExit where one is wrong."""
    torch.manual_seed(0)
    inputs = state_inputs(recurrence, sizes, torch.float32)
    batch, steps, width, _ = sizes
    grad = torch.randn(batch, steps, width)
    name, peer = PEERS[recurrence.name]
    contenders: dict[str, Forward] = {
        "native": lambda *x: scan(recurrence, x, backend="native")[0],
        "chunked": lambda *x: scan(recurrence, x, backend="chunked")[0],
        name: peer,
    }
    with torch.no_grad():
        want = contenders["chunked"](*inputs)
        for label, forward in contenders.items():
            error = ((forward(*inputs) - want).abs().max() / want.abs().max()).item()
            if not error < 1e-4:
                raise SystemExit(f"{label} {recurrence.name} is wrong by {error:.1e}")
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in contenders}
    limits = []
    for repeat in range(repeats):
        for label, forward in contenders.items():
            if repeat and sum(times[label][0]) > 5:
                continue  # once is enough of the slow ones
            limits.append(_limit(grad.numel()))
            times[label].append(_passes(forward, inputs, grad))
    moved = sum(x.nbytes for x in inputs) + grad.nbytes
    rows, limit = [], statistics.median(limits)
    native = [statistics.median(each) for each in zip(*times["native"], strict=True)]
    for label, pairs in times.items():
        forward, backward = (statistics.median(each) for each in zip(*pairs, strict=True))
        rows.append(
            {
                "scan": recurrence.name,
                "B, T, D, N": ", ".join(map(str, sizes)),
                "by": label,
                "forward, ms": round(forward * 1e3, 1),
                "backward, ms": round(backward * 1e3, 1),
                "native is faster by": f"{(forward + backward) / sum(native):.1f}",
                "share of the memory limit, forward": f"{moved / forward / limit:.1%}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for recurrence, sizes in QUICK if options.quick else CASES:
        rows += measured(recurrence, sizes, 1 if options.quick else 7)
        print(rows[-3:], flush=True)
    text = "# Selective scan and S4D beside their peers\n\n" + results.circumstances()
    text += f"\nfp32, {torch.get_num_threads()} threads; medians, contenders in turn.\n\n"
    text += results.table(rows)
    print(text)
    if not options.quick:
        results.result_path("states", ".md").write_text(text)


if __name__ == "__main__":
    main()
