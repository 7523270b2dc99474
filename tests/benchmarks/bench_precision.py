"""How exact scans are over long memories: ours, plain fp32, the paper's form, and peers.

    python -m tests.benchmarks.bench_precision [--quick]

minGRU with steady gates of memory m, and with random ones, over T steps in fp32: the relative error
of the last state, and of the gradient that reaches the first one (dh_last/dh0: the decay of all
steps), against fp64 of the same inputs. "over 8 shards" cuts the sequence and joins the spans as
devices do. A decay over many memories is known to T / m roundings of its gate, whoever makes it:
`conditioning`. Writes results/precision_*.md.
"""

import argparse
import math
from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan import Problem, mingru_scan
from models.scan import backend as backends
from models.scan.recurrences.mingru import MinGRU
from models.scan.recurrences.mingru.log_space import mingru_log_space
from tests.benchmarks import results

WIDTH = 8
Scan = Callable[[Tensor, Tensor], Tensor]  # kv [1, T, 2H], h0 [1, H] -> h_last [1, H]


def plain(kv: Tensor, h0: Tensor) -> Tensor:
    """h = a * h + b in fp32, a step at a time."""
    a, b = (x[0].unbind(0) for x in MinGRU().gates((kv,)))
    for at, bt in zip(a, b, strict=True):
        h0 = torch.addcmul(bt, at, h0)
    return h0


def eight_shards(kv: Tensor, h0: Tensor) -> Tensor:
    h = h0
    for shard in kv.chunk(8, dim=1):
        h = backends.summarize("native", Problem(MinGRU(), (shard,))).apply(h)
    return h


def mingru_pytorch(kv: Tensor, h0: Tensor) -> Tensor:
    """From PyPI, without its projections."""
    package = import_module("minGRU_pytorch.minGRU")
    gate, hidden = kv.chunk(2, dim=-1)
    values = torch.cat([h0.log()[:, None], -F.softplus(-gate) + package.log_g(hidden)], dim=1)
    decays = F.pad(-F.softplus(gate), (0, 0, 1, 0))
    return package.heinsen_associative_scan_log(decays, values)[:, -1]


def pararnn(kv: Tensor, h0: Tensor) -> Tensor:
    """pararnn-torch's diagonal scan, by which its Newton's method solves."""
    scan_diag = import_module("pararnn.solvers.scan").scan_diag
    a, b = MinGRU().gates((kv,))
    b = torch.cat([h0[:, None], b], dim=1)
    return scan_diag(F.pad(a, (0, 0, 1, 0)), b)[:, -1]


SCANS: dict[str, Scan] = {
    "ours, native": lambda kv, h0: mingru_scan(kv, h0, backend="native")[1],
    "ours, native, over 8 shards": eight_shards,
    "ours, chunked": lambda kv, h0: mingru_scan(kv, h0, backend="chunked")[1],
    "plain fp32": plain,
    "log-space": lambda kv, h0: mingru_log_space(kv, h0)[1],
    "minGRU-pytorch": mingru_pytorch,
    "pararnn-torch scan": pararnn,
}
LONGEST = {"plain fp32": 1 << 20, "ours, chunked": 1 << 20, "pararnn-torch scan": 1 << 20}


def gates(memory: float | None, steps: int) -> Tensor:
    """kv [1, T, 2H] of steady gates with that memory, a candidate of 1; of random ones for None."""
    if memory is None:
        return torch.randn(1, steps, 2 * WIDTH, generator=torch.Generator().manual_seed(0))
    kv = torch.full((1, steps, 2 * WIDTH), 0.5)
    kv[..., :WIDTH] = -math.log(memory - 1)
    return kv


def measured(scan: Scan, kv: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """h_last, and its gradient in h0."""
    h0 = h0.clone().requires_grad_()
    last = scan(kv, h0)
    (gradient,) = torch.autograd.grad(last.sum(), h0)
    return last.detach().double(), gradient.double()


def table(steps: int, memories: list[float | None]) -> list[dict[str, object]]:
    """A row per memory, a column per scan: errors of h_last and of its gradient in h0."""
    rows = []
    for memory in memories:
        kv, h0 = gates(memory, steps), torch.full((1, WIDTH), 0.25)
        exact = measured(SCANS["ours, native"], kv.double(), h0.double())
        row: dict[str, object] = {"m": "random gates" if memory is None else f"{memory:.0e}"}
        for name, scan in SCANS.items():
            try:
                if steps > LONGEST.get(name, steps):
                    raise RuntimeError
                got = measured(scan, kv, h0)
            except ImportError:
                row[name] = "not installed"
                continue
            except RuntimeError:  # too long for it
                row[name] = ""
                continue
            errors = [float((x - e).norm() / e.norm()) for x, e in zip(got, exact, strict=True)]
            vanished = exact[1].norm() < 1e-30  # what is left of it no fp32 number holds
            row[name] = f"{errors[0]:.0e}" + ("" if vanished else f", {errors[1]:.0e}")
        row["conditioning"] = "" if memory is None else f"{steps / memory * 2**-24:.0e}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short, nothing written")
    quick = parser.parse_args().quick
    text = f"# Exactness over long memories\n\n{results.circumstances()}\n"
    text += "Relative errors of h_last, and of its gradient in h0 where there is any left.\n"
    for steps in (1 << 10,) if quick else (1 << 14, 1 << 20, 1 << 22):
        rows = table(steps, [None, 1e1, 1e3, 1e5, 1e6, 1e7])
        text += f"\n## {steps:,} steps\n\n{results.table(rows)}"
    print(text)
    if not quick:
        results.result_path("precision", ".md").write_text(text)


if __name__ == "__main__":
    main()
