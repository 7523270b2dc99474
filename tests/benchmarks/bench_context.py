"""Speed and memory of one training step over the length of its sequence, and how that is run.

    python -m tests.benchmarks.bench_context [--longest TOKENS] [--quick]

Streamed in segments, whole, and with activations computed again. One worker on one thread, the
trainer's own step on random tokens, a process a cell; a cell that takes longer than the limit, or
will as the last ones grew, or more memory, ends its line. Writes results/context_*.md, .csv and
.png.
"""

import argparse
import os
from statistics import median
from typing import Any

from launch.compare.child import Call, Child, Failed
from launch.plot import Axes, Series, plot_lines
from models.config import ModelConfig
from tests.benchmarks import results
from trainer.config import Config, LaunchConfig, OptimConfig, TrainConfig

SEGMENT = 16_384
SHORTEST, GROWTH = 4_096, 4
SECONDS = 1200.0  # of a cell
STEPS, TIMED = 9, 10.0  # the median of so many, or of as many as fit into so many seconds
LONG = 30.0  # seconds of a step, from which none before it is needed
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4  # bytes, of a cell
LINES: dict[str, tuple[str, dict[str, Any]]] = {  # mixer, and how a sequence goes through it
    "minGRU, streamed": ("mingru", {"segment_len": SEGMENT}),
    "minGRU, whole": ("mingru", {}),
    "minGRU, recomputed": ("mingru", {"recompute": True}),
    "window, streamed": ("window", {"segment_len": SEGMENT}),
    "attention, streamed": ("attention", {"segment_len": SEGMENT}),
    "attention, whole": ("attention", {}),
}
SEGMENTED = ("minGRU, streamed", "window, streamed")
CUT = 1 << 17  # tokens that are cut into segments of these sizes
SIZES = [1024 << doubled for doubled in range(8)]


def _config(line: str, length: int, longest_segment: int) -> Config:
    mixer, how = LINES[line]
    if "segment_len" in how:
        how = {"segment_len": min(longest_segment, length)}
    return Config(
        model=ModelConfig(mixer=mixer, layers=2, width=64, window=256),
        train=TrainConfig(seq_len=length, **how),
        optim=OptimConfig(warmup_steps=0),
        launch=LaunchConfig(workers=1),
    )


def measured(lines: list[str], lengths: tuple[int, int], segment: int) -> list[dict[str, Any]]:
    """A row for each line and length, until a line's cell fails."""
    rows = []
    taken: dict[str, list[float]] = {name: [] for name in lines}  # seconds of a step
    length, longest = lengths
    while length <= longest:
        for name in list(taken):
            found = _cost(_config(name, length, segment), _expected(taken[name]))
            if found["MB over idle"] is None:
                del taken[name]
            else:
                taken[name].append(length / found["tokens/s"])
            rows.append({"line": name, "tokens": length, **found})
            print(rows[-1], flush=True)
        length *= GROWTH
    return rows


def _expected(taken: list[float]) -> float:
    """Seconds of the next length's step, if it grows as the last one did."""
    return taken[-1] * max(GROWTH, taken[-1] / taken[-2]) if len(taken) > 1 else 0.0


def by_segment(length: int, segments: list[int]) -> list[dict[str, Any]]:
    """A row for each length of a segment, of one sequence: the ground for segment_len=auto."""
    rows = []
    for segment in segments:
        cells = {name: _cost(_config(name, length, segment)) for name in SEGMENTED}
        rows.append(
            {"segment": segment, **{name: cell["tokens/s"] for name, cell in cells.items()}}
        )
        print(rows[-1], flush=True)
    return rows


def _cost(config: Config, expected: float = 0.0) -> dict[str, Any]:
    """Tokens per second and memory of a step of `expected` seconds; why not, where it fails."""
    if expected > SECONDS:
        return {"tokens/s": f"not tried: about {expected:,.0f} s", "MB over idle": None}
    length = config.train.seq_len
    how = (STEPS, TIMED, 1 if expected < LONG else 0)
    call = Call("trainer.measure:measure_training", config, how, SECONDS, MEMORY)
    cost = Child(call, {"OMP_NUM_THREADS": "1"}).wait()
    if isinstance(cost, Failed):
        return {"tokens/s": cost.why.strip().splitlines()[-1], "MB over idle": None}
    speed = round(length / median(cost.step_seconds))
    return {"tokens/s": speed, "MB over idle": round(cost.peak_memory_bytes / 1e6)}


def _series(rows: list[dict[str, Any]], of: str) -> Series:
    measured = [row for row in rows if row["MB over idle"] is not None]
    lines = {name: [(r["tokens"], r[of]) for r in measured if r["line"] == name] for name in LINES}
    return {name: points for name, points in lines.items() if points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=1 << 24, help="tokens")
    parser.add_argument("--quick", action="store_true", help="one short length, nothing written")
    options = parser.parse_args()
    lines = list(LINES)
    if options.quick:
        rows = measured(lines[:1] + lines[-1:], (512, 512), 512)
    else:
        rows = measured(lines, (SHORTEST, options.longest), SEGMENT)
    length, sizes = (2048, [512]) if options.quick else (CUT, SIZES)
    cut = by_segment(length, sizes)
    text = "# One step over the length of its sequence\n\n" + results.circumstances()
    text += (
        f"\n2 layers of width 64, fp32, one thread, segments of {SEGMENT:,} tokens, windows of "
        f"256; the median of {STEPS} steps, or of as many as fit into {TIMED:.0f} s. A cell ends "
        f"after {SECONDS:.0f} s or at {MEMORY / 2**30:.0f} GiB, and its line with it.\n\n"
    )
    text += results.table(rows)
    text += f"\nTokens per second of {length:,} tokens by the length of a segment:\n\n"
    text += results.table(cut)
    print(text)
    if not options.quick:
        results.write_csv("context", rows)
        results.result_path("context", ".md").write_text(text)
        for of, suffix in (("tokens/s", "_speed.png"), ("MB over idle", "_memory.png")):
            axes = Axes("One training step", "tokens of its sequence", of, lengths=True)
            plot_lines(results.result_path("context", suffix), _series(rows, of), axes)


if __name__ == "__main__":
    main()
