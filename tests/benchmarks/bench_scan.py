"""The scan against the memory limit and against its peers.

    python -m tests.benchmarks.bench_scan [--quick]

First a gate: our implementations must equal the loop in fp64, or the chunked form where T is long.
Then, for each shape, passes in turn, each beside the limit measured at that moment: torch.add on a
CPU (two reads and a write), a copy on a GPU. A share is (bytes the pass must move / its time) over
the limit's bytes per second; bytes are inputs read and outputs written once, whatever an
implementation really moves. Medians of paired runs, freed memory kept as a worker keeps it
(trainer/memory.py).
"""

import argparse
import statistics
import time
from typing import Any

import torch

from launch.plot import Axes, plot_lines
from models.scan import RECURRENCES, choose_backend, scan
from tests.benchmarks import results
from tests.benchmarks.scan_peers import DEVICE, GPU_PEERS, PEERS, Case, Run, ours
from trainer.memory import keep_freed_memory

SHAPES = {"cuda": [(1, 1 << 20, 1024), (32, 4096, 1024)], "cpu": [(1, 65536, 256), (8, 4096, 512)]}
LENGTHS = {"cuda": range(10, 21, 2), "cpu": range(10, 17, 2)}  # of the plot, in powers of two
ROWS = {name: r for name, r in RECURRENCES.items() if not r.own_output}  # else: bench_states
PASSES = ("forward", "backward", "forward+backward")
# Least shares of the limit, forward and backward: the project's targets on a CPU in fp32.
TARGETS = {"linear": (0.85, 0.75), "mingru": (0.6, 0.6), "minlstm": (0.6, 0.6)}


def contenders(case: Case, which: str) -> tuple[dict[str, Run], dict[str, str]]:
    """What can run this pass, ours first, and why the others cannot."""
    backend = choose_backend("auto", case.recurrence, DEVICE, case.dtype)
    runs, missing = {backend: ours(case, which, backend)}, {}
    if case.shape[1] <= 1 << 16:
        runs["chunked"] = ours(case, which, "chunked")
    for name, peer in PEERS.items():
        try:
            run = peer(case, which)
            if run:
                run()
                runs[name] = run
        except ImportError as error:
            missing[name] = f"not installed ({error.name})"
        except (RuntimeError, AssertionError, torch.OutOfMemoryError) as error:
            missing[name] = f"fails at {case.shape}: {str(error).splitlines()[0][:80]}"
    return runs, missing


def gate() -> None:
    """Refuse to time what is wrong: every recurrence, dtype and way to share it between threads."""
    for shape, definition in (((3, 300, 70), "reference"), ((1, 9001, 70), "chunked")):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            for name, recurrence in ROWS.items():
                case = Case(name, dtype, shape)
                exact = tuple(x.detach().double().requires_grad_() for x in case.inputs)
                want = scan(recurrence, exact, case.h_in.double(), backend=definition)
                wanted = (*want, *torch.autograd.grad(want[0], exact, case.grad_h.double()))
                for backend in dict.fromkeys(
                    (choose_backend("auto", recurrence, DEVICE, dtype), "chunked")
                ):
                    got = scan(recurrence, case.inputs, case.h_in, backend=backend)
                    both = (*got, *torch.autograd.grad(got[0], case.inputs, case.grad_h))
                    for a, e in zip(both, wanted, strict=True):
                        error = float((a.detach().double() - e.detach()).norm() / e.detach().norm())
                        if not error < tolerance:
                            raise SystemExit(
                                f"{backend} {name} is wrong by {error:.1e}: nothing is timed"
                            )


class Limit:
    """Bytes per second of the memory, on tensors as large as one state of the case."""

    def __init__(self, case: Case) -> None:
        count = case.grad_h.nbytes // 4
        self.a, self.b, self.out = (torch.rand(count, device=DEVICE) for _ in range(3))
        self.bytes = (2 if DEVICE == "cuda" else 3) * self.out.nbytes

    def __call__(self) -> None:
        if DEVICE == "cuda":
            self.out.copy_(self.a)
        else:
            torch.add(self.a, self.b, out=self.out)


def seconds(run: Run) -> float:
    if DEVICE == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, which: str, repeats: int, missing: dict[str, str]) -> list[dict[str, Any]]:
    """A row per implementation: medians over repeats, each run beside the limit of its moment."""
    runs, absent = contenders(case, which)
    missing.update(absent)
    limit = Limit(case)
    times: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    limits: list[float] = []
    for run in (limit, *runs.values()):
        seconds(run)
    for repeat in range(repeats):
        for name, run in runs.items():
            if repeat >= 3 and statistics.median(times[name]) > 0.5:
                continue  # slow peers: three runs are enough
            before = seconds(limit)
            times[name].append(seconds(run))
            rate = 2 * limit.bytes / (before + seconds(limit))
            shares[name].append(case.bytes_moved(which) / times[name][-1] / rate)
            limits.append(rate)
    first = statistics.median(next(iter(times.values())))
    batch, steps, width = case.shape
    return [
        {
            "recurrence": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "B": batch,
            "T": steps,
            "H": width,
            "pass": which,
            "implementation": name,
            "ms": round(statistics.median(times[name]) * 1e3, 3),
            "GB/s": round(case.bytes_moved(which) / statistics.median(times[name]) / 1e9, 2),
            "limit GB/s": round(statistics.median(limits) / 1e9, 1),
            "share of limit": round(statistics.median(shares[name]), 3),
            "spread": f"{min(shares[name]):.2f}-{max(shares[name]):.2f}",
            "times ours": round(statistics.median(times[name]) / first, 1),
            "repeats": len(times[name]),
        }
        for name in runs
    ]


def verdicts(rows: list[dict[str, Any]]) -> str:
    """The project's targets beside what was measured, in words."""
    lines = []
    for row in rows:
        index = {"forward": 0, "backward": 1}.get(row["pass"])
        if DEVICE == "cpu" and row["implementation"] == "native" and row["dtype"] == "float32":
            if index is None or row["recurrence"] not in TARGETS:
                continue
            target, share = TARGETS[row["recurrence"]][index], row["share of limit"]
            place = f"({row['B']}, {row['T']}, {row['H']})"
            word = "met" if share >= target else "MISSED"
            lines.append(
                f"- {row['recurrence']} {row['pass']} at {place}: {share:.0%} of the limit, "
                f"target {target:.0%}: {word}"
            )
        if row["implementation"] in ("log-space", "minGRU-pytorch") and row["pass"] != "backward":
            target = 50 if row["pass"] == "forward" else 30
            place = f"({row['B']}, {row['T']}, {row['H']})"
            word = "met" if row["times ours"] >= target else "MISSED"
            lines.append(
                f"- {row['implementation']} {row['pass']} at {place} takes {row['times ours']} "
                f"times ours, target {target}: {word}"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    keep_freed_memory()
    gate()
    shapes, repeats, dtypes = SHAPES[DEVICE], options.repeats, [torch.float32, torch.bfloat16]
    if options.quick:
        shapes, repeats, dtypes = [(1, 4096, 64)], 3, [torch.float32]
    missing: dict[str, str] = {}
    if DEVICE == "cpu":
        missing |= {name: "runs on a GPU only" for name in GPU_PEERS}
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            for name in ("linear", "mingru", "minlstm"):
                case = Case(name, dtype, shape)
                for which in PASSES:
                    rows += measure(case, which, repeats, missing)
                    print(results.table(rows[-1:]).splitlines()[-1], flush=True)
                del case
    text = "# The scan against the memory limit and its peers\n\n" + results.circumstances()
    text += "".join(f"- peer {name}: {reason}\n" for name, reason in missing.items())
    text += "\nTargets, and what was measured:\n\n" + verdicts(rows) + "\n" + results.table(rows)
    print(text)
    if options.quick:
        return
    results.write_csv("scan", rows)
    results.result_path("scan", ".md").write_text(text)
    series: dict[str, list[tuple[float, float]]] = {"memory limit": []}
    width = shapes[0][2]
    for power in LENGTHS[DEVICE]:
        case = Case("mingru", torch.float32, (1, 1 << power, width))
        for row in measure(case, "forward+backward", min(repeats, 9), missing):
            series.setdefault(row["implementation"], []).append((row["T"], row["GB/s"]))
        series["memory limit"].append((row["T"], row["limit GB/s"]))
    plot_lines(
        results.result_path("scan", ".png"),
        series,
        Axes(
            f"minGRU scan, forward and backward, fp32, B=1, H={width} ({results.hardware()})",
            "tokens T",
            "useful GB/s",
            lengths=True,
        ),
        reference="memory limit",
    )


if __name__ == "__main__":
    main()
