"""One step on a very long sequence, killed once on the way, beside one that nobody disturbs.

    python -m tests.benchmarks.marathon [--tokens N] [--quick]

Makes a text of that length, trains configs/marathon.yaml on it twice, by the commands of the
README, and kills the second with everything below it when it has been past two fifths of its
segments; the same command then goes on within the step. Both must end in the same weights, to the
bit. Writes results/marathon_*.md.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.benchmarks import results
from trainer.checkpoint import WEIGHTS
from trainer.layout import Plan
from trainer.run_folder import RunFolder, read_lines

TOKENS = 100_000_000
CONFIG = "configs/marathon.yaml"
POLL_SECONDS = 0.2


def make_data(folder: Path, tokens: int) -> Path:
    """A prepared folder of one document of words: what is learned of it is no matter."""
    text, out = folder / "marathon.txt", folder / "data"
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000)]
    left = int(tokens * 1.01) + 4096  # some are held out
    with text.open("w") as f:
        while left > 0:
            line = " ".join(draw.choices(words, k=2000)) + "\n"
            f.write(line)
            left -= len(line)
    held_out = ["--held-out", "0.005"]
    subprocess.run(
        [sys.executable, "-m", "data_prep", str(text), "--out", str(out), *held_out], check=True
    )
    text.unlink()
    return out


def command(run: Path, data: Path, tokens: int, more: list[str]) -> list[str]:
    settings = [f"run.dir={run}", f"data.path={data}", f"train.seq_len={tokens}", *more]
    return [sys.executable, "-m", "launch", "train", CONFIG, *settings]


def reached(run: Path) -> int:
    """Runs of a segment that the newest checkpoint holds."""
    manifest = RunFolder(run).newest_manifest()
    return manifest.get("runs", 0) if manifest else 0


def killed(arguments: list[str], run: Path, after: int) -> int:
    """Begin it, and kill it once that many runs are saved; how many were."""
    process = subprocess.Popen(arguments, start_new_session=True)
    while reached(run) < after:
        if process.poll() is not None:
            raise SystemExit(f"it ended by itself, with {process.returncode}: too short to kill")
        time.sleep(POLL_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return reached(run)


def outcome(run: Path) -> dict[str, Any]:
    """A finished run's figures of its only step, and its weights."""
    folder = RunFolder(run)
    (line,) = read_lines(folder.metrics)
    return {**line, "weights": load_file(folder.saved()[0] / WEIGHTS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--folder", type=Path, default=Path("runs/marathon"))
    parser.add_argument("--quick", action="store_true", help="300,000 tokens, nothing written")
    options = parser.parse_args()
    tokens = 300_000 if options.quick else options.tokens
    more = ["train.segment_len=8192", "checkpoint.every_seconds=0.1"] if options.quick else []
    if options.folder.exists():
        raise SystemExit(f"{options.folder} is there, and would be gone on with: remove it first")
    options.folder.mkdir(parents=True)
    data = make_data(options.folder, tokens)
    whole, cut = options.folder / "whole", options.folder / "killed"
    started = time.monotonic()
    subprocess.run(command(whole, data, tokens, more), check=True)
    undisturbed = time.monotonic() - started
    segments = -(-tokens // (8192 if options.quick else 65536))
    runs = len(Plan(segments).reads)
    started = time.monotonic()
    saved = killed(command(cut, data, tokens, more), cut, runs * 2 // 5)
    until_killed = time.monotonic() - started
    print(f"killed with {saved:,} of {runs:,} runs of a segment saved", flush=True)
    started = time.monotonic()
    subprocess.run(command(cut, data, tokens, more), check=True)
    resumed = time.monotonic() - started
    expected, got = outcome(whole), outcome(cut)
    assert all((got["weights"][name] == x).all() for name, x in expected["weights"].items())
    assert (got["loss"], got["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    rows = [
        {
            "run": name,
            "minutes": round(seconds / 60, 1),
            "tokens/s": round(tokens / line["step_seconds"]),
            "peak MB of a worker": round(line["peak_memory_bytes"] / 1e6),
            "loss": line["loss"],
            "gradient norm": line["grad_norm"],
        }
        for name, seconds, line in (
            ("undisturbed", undisturbed, expected),
            ("killed", until_killed + resumed, got),
        )
    ]
    text = "# One step on a very long sequence, killed on the way\n\n" + results.circumstances()
    text += (
        f"\n{tokens:,} tokens in {segments:,} segments, `{CONFIG}`; killed (SIGKILL, all its "
        f"processes) after {until_killed / 60:.1f} minutes, with {saved:,} of {runs:,} runs of a "
        f"segment saved; the same command went on from there. Weights, loss and gradient norm are "
        f"equal to the bit.\n\n"
    )
    text += results.table(rows)
    print(text)
    if not options.quick:
        results.result_path("marathon", ".md").write_text(text)


if __name__ == "__main__":
    main()
