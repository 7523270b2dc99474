"""Where a training step's time goes.

    python -m tests.benchmarks.bench_step [CONFIG] [key=value ...]

Without CONFIG it runs the cases below, and writes results/step_*.md.

Runs the trainer's own forward, backward and optimizer step on one process and random tokens, with
the shard that one worker of CONFIG has. First steps unprofiled, for the time; then a few under
torch's profiler, for the share of each part. The exchange and the reading of data take no part:
metrics.jsonl of a run has both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from models.flops import parameters, training_flops_per_token
from tests.benchmarks import results
from trainer.config import Config, load_config
from trainer.measure import timed_steps
from trainer.memory import peak_memory_bytes
from trainer.worker import Worker

# Part of a step <- words in an operator's name; the first that matches.
PARTS = {
    "optimizer": ("adam", "foreach"),
    "scan": ("longhaul::scan",),
    "loss": ("log_softmax", "gather", "scatter", "summedcrossentropy"),
    "matrix products": ("mm", "linear", "matmul", "dot"),
    "norms": ("rms_norm", "rsqrt", "mean", "pow"),
    "embedding": ("embedding", "index"),
    "reductions": ("sum", "norm"),
    "copies and casts": ("copy", "cat", "clone", "_to_", "fill", "zero", "contiguous", "empty"),
}
NAMES = ("matrix products", "elementwise", *(part for part in PARTS if part != "matrix products"))

# What is run without a CONFIG: the demo's shard on its worker's one core; on both, a model as large
# as a prototype that was measured before (LOG.md), on the whole sequence, and a 126M model.
LARGE = "model.width=1024 model.layers=10 train.seq_len=4096"
COMPILE = "train.compile=true"
WHOLE = "model.width=192 parallel.sp=1 launch.workers=1"
CASES = {
    "demo, fp32": "--threads 1 configs/demo.yaml train.dtype=fp32",
    "demo, bf16": "--threads 1 configs/demo.yaml train.dtype=bf16",
    "demo, bf16, compiled": f"--threads 1 configs/demo.yaml train.dtype=bf16 {COMPILE}",
    "1.8M parameters, fp32": f"configs/demo.yaml train.dtype=fp32 {WHOLE}",
    "1.8M parameters, bf16": f"configs/demo.yaml train.dtype=bf16 {WHOLE}",
    "1.8M parameters, bf16, compiled": f"configs/demo.yaml train.dtype=bf16 {WHOLE} {COMPILE}",
    "126M parameters, fp32": f"--steps 3 configs/demo.yaml train.dtype=fp32 {LARGE}",
    "126M parameters, bf16": f"--steps 3 configs/demo.yaml train.dtype=bf16 {LARGE}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.config is None:
        _write({name: _run_alone(arguments) for name, arguments in CASES.items()})
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*options.overrides, f"run.dir={folder}"]
        whole = load_config(options.config, overrides)
        shard = whole.train.seq_len // whole.parallel.sp
        alone = ["parallel.sp=1", "launch.workers=1", "evaluate.sequences=0"]
        alone += [f"train.seq_len={shard}", f"train.batch_size={whole.train.micro_batch_size}"]
        config = load_config(options.config, [*overrides, *alone])
        print(json.dumps(_profile(config, options.steps)))


def _run_alone(arguments: str) -> dict[str, Any]:
    """A process for each case: the peak of memory belongs to one."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", *arguments.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def _write(cases: dict[str, dict[str, Any]]) -> None:
    rows, shares = [], []
    for name, case in cases.items():
        low, high = case["spread"]
        rows.append(
            {
                "case": name,
                "threads": case["threads"],
                "tokens": case["tokens"],
                "s/step": case["step_seconds"],
                "spread": f"{low:.3f}-{high:.3f}",
                "tokens/s": f"{case['tokens_per_second']:,}",
                "GFLOP/s": case["gflops"],
                "peak GiB": case["peak_memory_gib"],
            }
        )
        shares.append(
            {"case": name, **{part: f"{case['share'].get(part, 0):.1%}" for part in NAMES}}
        )
    text = "# Where a training step's time goes\n\n" + results.circumstances()
    text += "\nOne process, forward, backward and optimizer. A median of unprofiled steps.\n\n"
    text += f"{results.table(rows)}\nShares of the profiled time:\n\n{results.table(shares)}"
    results.result_path("step", ".md").write_text(text)
    print(text)


def _profile(config: Config, steps: int) -> dict[str, Any]:
    worker = Worker.join(config)
    clock = timed_steps(worker)
    for _ in range(3):
        next(clock)
    seconds = [next(clock) for _ in range(steps)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            next(clock)
    parts: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = {}
    for event in profiler.key_averages():
        operators[event.key] = event.self_cpu_time_total
        name = event.key.lower()
        part = next(
            (p for p, words in PARTS.items() if any(w in name for w in words)), "elementwise"
        )
        parts[part] += event.self_cpu_time_total
    total = sum(parts.values())
    median = statistics.median(seconds)
    count = config.train.micro_batch_size * config.train.seq_len
    return {
        "hardware": results.hardware(),
        "threads": torch.get_num_threads(),
        "dtype": config.train.dtype,
        "parameters": parameters(config.model),
        "tokens": count,
        "step_seconds": round(median, 4),
        "spread": [round(min(seconds), 4), round(max(seconds), 4)],
        "tokens_per_second": round(count / median),
        "gflops": round(
            training_flops_per_token(config.model, config.train.seq_len) * count / median / 1e9, 1
        ),
        "peak_memory_gib": round(peak_memory_bytes(worker.device) / 2**30, 2),
        "share": {p: round(t / total, 3) for p, t in sorted(parts.items(), key=lambda x: -x[1])},
        "largest": {
            name: round(time / total, 3)
            for name, time in sorted(operators.items(), key=lambda x: -x[1])[:14]
        },
    }


if __name__ == "__main__":
    main()
