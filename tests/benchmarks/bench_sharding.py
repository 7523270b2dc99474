"""What sharing a sequence costs a step: two workers with a half each, beside two with one each.

    python -m tests.benchmarks.bench_sharding [--quick]

The demo's model on random tokens, as many a worker either way, steps of both kinds in turn in the
same two processes of one thread. Memories are spread up to 1,024 tokens, as they are where nothing
is said, and up to a shard, of which a shard's map must read more. Writes results/sharding_*.md.
"""

import argparse
from statistics import median
from typing import Any

from models.config import ModelConfig
from tests.benchmarks import results
from tests.distributed import run_distributed
from trainer.config import Config, LaunchConfig, OptimConfig, ParallelConfig, TrainConfig
from trainer.measure import timed_steps
from trainer.worker import Worker

TOKENS = [2048, 8192, 32768]  # of a worker
MEMORY = 1024
Row = tuple[Any, int, int]  # mixer, tokens of a worker, memories to so many tokens
ROWS: list[Row] = [
    *((mixer, tokens, MEMORY) for mixer in ("mingru", "minlstm") for tokens in TOKENS),
    *((mixer, TOKENS[-1], MEMORY) for mixer in ("window", ["mingru", "mingru", "window"])),
    ("mingru", TOKENS[-1], TOKENS[-1]),
]


def _config(row: Row, sp: int, layers: int, width: int) -> Config:
    mixer, tokens, memory = row
    return Config(
        model=ModelConfig(
            mixer=mixer, layers=layers, width=width, window=256, memory_tokens=memory
        ),
        train=TrainConfig(seq_len=tokens * sp, batch_size=2 // sp),
        parallel=ParallelConfig(sp=sp),
        optim=OptimConfig(warmup_steps=0),
        launch=LaunchConfig(workers=2),
    )


def _steps(configs: list[Config], rounds: int) -> list[list[tuple[float, float]]]:
    """Seconds of a step, and of them in exchanges, for each configuration, round by round."""
    workers = [Worker.join(config) for config in configs]
    clocks = [timed_steps(worker) for worker in workers]
    taken: list[list[tuple[float, float]]] = [[] for _ in configs]
    for round_ in range(-1, rounds):  # one that does not count
        for worker, clock, mine in zip(workers, clocks, taken, strict=True):
            worker.topology.sequence.meter.take()
            seconds = next(clock)
            if round_ >= 0:
                mine.append((seconds, worker.topology.sequence.meter.take()[0]))
    return taken


def measured(row: Row, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Medians over the rounds, of rank 0."""
    configs = [_config(row, sp, *shape) for sp in (1, 2)]
    apart, shared = run_distributed(_steps, 2, configs, rounds, fresh=True)[0]
    ratios = [one / other for (one, _), (other, _) in zip(apart, shared, strict=True)]
    ordered = sorted(ratios)
    mixer, tokens, memory = row
    return {
        "mixer": mixer if isinstance(mixer, str) else "+".join(mixer),
        "tokens a worker": tokens,
        "memories to": memory,
        "dp=2, ms": round(1e3 * median(seconds for seconds, _ in apart), 1),
        "sp=2, ms": round(1e3 * median(seconds for seconds, _ in shared), 1),
        "of it in exchanges, ms": round(1e3 * median(waited for _, waited in shared), 1),
        "speed of sp=2 over dp=2": round(median(ratios), 3),
        "its quarters": f"{ordered[rounds // 4]:.3f} to {ordered[-1 - rounds // 4]:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small shape, nothing written")
    options = parser.parse_args()
    asked = [("mingru", 64, MEMORY)] if options.quick else ROWS
    shape, rounds = ((2, 16), 2) if options.quick else ((4, 128), 12)
    rows = []
    for row in asked:
        rows.append(measured(row, shape, rounds))
        print(rows[-1], flush=True)
    text = "# What sharing a sequence costs a step\n\n" + results.circumstances()
    text += (
        f"\n{shape[0]} layers of width {shape[1]}, fp32, two processes of one thread; {rounds} "
        f"steps of each kind in turn, medians of rank 0; the ratio is the median of pairs.\n\n"
    )
    text += results.table(rows)
    print(text)
    if not options.quick:
        results.result_path("sharding", ".md").write_text(text)


if __name__ == "__main__":
    main()
