"""The native scan of this commit against that of an earlier one, in one run.

    python -m tests.benchmarks.bench_before COMMIT [--quick]

Each commit has a process of its own, which waits while the other works; passes alternate, and the
ratio is taken pair by pair. A pass is the fastest of three. Writes results/before_*.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import results
from trainer.provenance import commit

ROOT = Path(__file__).parents[2]
SHAPES = ((1, 65536, 256), (8, 4096, 512))
NAMES, DTYPES = ("linear", "mingru", "minlstm"), ("float32", "bfloat16")
# Runs in either tree: what it calls must have had these names then.
WORKER = """
import sys, time, torch
from tests.benchmarks.scan_peers import Case, ours
from trainer.memory import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(int(sys.argv[1]))
known = None
for line in sys.stdin:
    if line != known:
        name, dtype, batch, steps, width, which = line.split()
        torch.manual_seed(0)
        case = Case(name, getattr(torch, dtype), (int(batch), int(steps), int(width)))
        run, known = ours(case, which, "native"), line
        run(), run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(min(times), flush=True)
"""


class Tree:
    """The code of one commit, at work."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(os.cpu_count() or 1)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: str) -> float:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(before: Tree, after: Tree, case: str, rounds: int) -> dict[str, str]:
    """Medians over rounds, each with the two in another order."""
    pairs = []
    before.seconds(case), after.seconds(case)  # warm
    for number in range(rounds):
        first, second = (before, after) if number % 2 else (after, before)
        times = {first: first.seconds(case), second: second.seconds(case)}
        pairs.append((times[before], times[after]))
    ratios = sorted(now / then for then, now in pairs)
    name, dtype, batch, steps, width, which = case.split()
    tenth = len(ratios) // 10
    return {
        "recurrence": name,
        "dtype": dtype,
        "shape": f"({batch}, {steps}, {width})",
        "pass": which,
        "before, ms": f"{statistics.median(then for then, _ in pairs) * 1e3:.2f}",
        "after, ms": f"{statistics.median(now for _, now in pairs) * 1e3:.2f}",
        "after / before": f"{statistics.median(ratios):.3f}",
        "tenths": f"{ratios[tenth]:.2f}-{ratios[-1 - tenth]:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--quick", action="store_true", help="a small shape, nothing written")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    shapes, rounds = SHAPES, options.rounds
    if options.quick:
        shapes, rounds = ((1, 512, 64),), 3
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", folder, options.commit], check=True)
        before, after = Tree(Path(folder)), Tree(ROOT)
        try:
            rows = [
                compare(before, after, f"{name} {dtype} {b} {t} {h} {which}", rounds)
                for b, t, h in shapes
                for dtype in DTYPES
                for name in NAMES
                for which in ("forward", "backward")
            ]
        finally:
            before.close(), after.close()
            subprocess.run([*git, "remove", "--force", folder], check=True)
    text = f"# The native scan before and after: {options.commit} and {commit()}\n\n"
    text += f"{results.circumstances()}\n{results.table(rows)}"
    print(text)
    if not options.quick:
        results.result_path("before", ".md").write_text(text)


if __name__ == "__main__":
    main()
