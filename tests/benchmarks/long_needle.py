"""A needle a million tokens back, learned over growing lengths: streamed whole, and truncated.

    python -m tests.benchmarks.long_needle [--longest TOKENS] [--quick]

By the commands of the README: data of data_prep.synthetic, training of configs/needle.yaml at each
length from the weights of the length before. From the length on that takes more than one segment a
second line of trainings cuts the gradient at segments (train.truncate), for as much computing: four
steps to three, since a streamed step runs a forward more. The two lines run side by side, a worker
each. A long sequence has no more answers to learn from than a short one, and how to read a value is
lost there in part. Many sequences of a shorter length mend that, once before and once after steps
in which all values lie as far back as there is room. What each has learned at every length, and
what it answers at the longest, is in results/long_needle_*.md.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any

from tests.benchmarks import results

CONFIG = "configs/needle.yaml"
SEGMENT = 65_536
ANSWER = 2  # tokens
EVALUATED = 48  # sequences, sixteen a distance


@dataclass(frozen=True)
class Stage:
    """A length, and how much is trained at it."""

    tokens: int
    batch: int  # sequences a step
    steps: int
    rate: float
    workers: int = 1
    far: bool = False  # values lie all of the length back, where leaks tell: in training alone

    def run(self, line: str) -> str:
        """The name of its run's folder."""
        return f"{line}-{self.tokens}x{self.steps}"


STAGES = [
    Stage(16, 512, 300, 1e-2),  # a thousand answers a step: soon learned
    Stage(64, 256, 200, 3e-3),
    Stage(256, 64, 300, 3e-3),
    Stage(4096, 4, 200, 3e-3),
    Stage(16384, 4, 150, 4e-3),
    Stage(65536, 4, 80, 4e-3, workers=2),
    Stage(262144, 2, 60, 4e-3),
    Stage(1048576, 2, 24, 4e-3),
    Stage(16384, 16, 60, 1e-3),
    Stage(1048576, 2, 22, 6e-3, far=True),
    Stage(16384, 16, 50, 1e-3),
]
LONGEST = max(stage.tokens for stage in STAGES)
QUICK = [Stage(64, 8, 4, 1e-3), Stage(256, 2, 4, 1e-3)]


def launch(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def make_data(folder: Path, stage: Stage, far: bool = False) -> Path:
    """Needles at a quarter, a half and all of the length, in turn; `far`: all of it."""
    count = stage.batch * -(-stage.steps * 4 // 3)
    out = folder / f"data-{stage.tokens}-{count}{'-far' * far}"
    most = stage.tokens - 2 * ANSWER
    distances = [most] if far else [stage.tokens // 4, stage.tokens // 2, most]
    sizes = {
        "length": stage.tokens,
        "tokens": ANSWER,
        "train": count,
        "held-out": EVALUATED,
        "distances": ",".join(map(str, distances)),
        "seed": int(far),
    }
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    if not out.exists():
        launch("data_prep.synthetic", "needle", "--out", str(out), *options)
    return out


def train(
    run: Path, data: Path, stage: Stage, begun: Path | None, segment: int, truncate: bool
) -> dict[str, Any]:
    """A run at this length from another's weights; its evaluation, and how fast it was."""
    steps = stage.steps * 4 // 3 if truncate and stage.tokens > segment else stage.steps
    settings = {
        "run.dir": run,
        "data.path": data,
        "train.seq_len": stage.tokens,
        "train.batch_size": stage.batch,
        "train.steps": steps,
        "optim.learning_rate": stage.rate,
        "launch.workers": stage.workers,
        "train.micro_batch_size": max(1, min(stage.batch // 2, segment // stage.tokens)),
        "checkpoint.every": max(1, steps // 4),
        "evaluate.sequences": EVALUATED,
    }
    if stage.tokens > segment:
        settings |= {"train.segment_len": segment, "train.truncate": str(truncate).lower()}
    if begun:
        settings["train.init_from"] = begun
    if stage.far:
        settings |= {"data.path": make_data(run.parent, stage, far=True), "evaluate.path": data}
    launch("launch", "train", CONFIG, *(f"{key}={value}" for key, value in settings.items()))
    return evaluated(run)


def evaluated(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["step_seconds"] for line in lines)
    trained = {"million tokens": lines[-1]["tokens"] / 1e6, "minutes": seconds / 60}
    rounded = {name: round(value, 1) for name, value in trained.items()}
    return {**evaluation(run), "trained": {"steps": lines[-1]["step"], **rounded}}


def evaluation(run: Path) -> dict[str, Any]:
    result = run / "evaluation.json"
    if not result.exists():
        raise SystemExit(f"{run} was stopped before its end; the same command goes on.")
    return json.loads(result.read_text())


def row(line: str, trained: Stage, asked: Stage, found: dict[str, Any]) -> dict[str, Any]:
    shares = {f"{name} back": f"{right:.1%}" for name, right in by_distance(found)}
    return {
        "training": line,
        "last at": f"{trained.tokens:,}",
        **found["trained"],
        "asked at": f"{asked.tokens:,}",
        **shares,
    }


def by_distance(found: dict[str, Any]) -> list[tuple[str, float]]:
    names = "1/4", "1/2", "all of it"
    return [(name, each[2]) for name, each in zip(names, found["by_distance"], strict=True)]


def evaluate_longer(run: Path, data: Path, stage: Stage) -> dict[str, Any]:
    """What a finished run answers at another length: the same command evaluates it there."""
    longer = {
        "run.dir": run,
        "evaluate.path": data,
        "evaluate.seq_len": stage.tokens,
        "evaluate.sequences": EVALUATED,
    }
    settings = (f"{key}={value}" for key, value in longer.items())
    launch("launch", "train", str(run / "config.yaml"), *settings)
    return {**evaluation(run), "trained": dict.fromkeys(("steps", "million tokens", "minutes"), "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens, beyond a segment")
    parser.add_argument("--folder", type=Path, default=Path("runs/needle"))
    parser.add_argument("--quick", action="store_true", help="two short lengths, nothing written")
    options = parser.parse_args()
    if options.longest <= SEGMENT:
        parser.error(f"--longest {options.longest}: only what is longer than {SEGMENT} is streamed")
    stages = QUICK if options.quick else [s for s in STAGES if s.tokens <= options.longest]
    segment = 64 if options.quick else SEGMENT
    rows: list[dict[str, Any]] = []
    adding = Lock()

    def add(line: str, trained: Stage, asked: Stage, found: dict[str, Any]) -> None:
        with adding:
            rows.append(row(line, trained, asked, found))
            print(rows[-1], flush=True)

    def trained(line: str, stages: list[Stage], begun: Path | None) -> Path | None:
        for stage in stages:
            run = folder / stage.run(line)
            how = (segment, line == "truncated")
            add(line, stage, stage, train(run, make_data(folder, stage), stage, begun, *how))
            begun = run
        return begun

    folder, longest = options.folder, max(stages, key=lambda stage: stage.tokens)
    for stage in stages:
        make_data(folder, stage)
        if stage.far:
            make_data(folder, stage, far=True)
    shared = list(takewhile(lambda stage: stage.tokens <= segment, stages))
    rest = stages[len(shared) :]
    begun = trained("streamed", shared, None)
    lines = ("streamed", "truncated")

    def ask(line: str, stage: Stage) -> None:
        run, data = folder / stage.run(line), make_data(folder, longest)
        add(line, stage, longest, evaluate_longer(run, data, longest))

    asked = [("streamed", s) for s in stages if segment <= s.tokens < longest.tokens]
    if rest[-1].tokens < longest.tokens:
        asked += [(line, rest[-1]) for line in lines]
    with ThreadPoolExecutor(2) as side_by_side:
        list(side_by_side.map(lambda line: trained(line, rest, begun), lines))
        list(side_by_side.map(lambda pair: ask(*pair), asked))
    print(page := written(segment, rows))
    if not options.quick and longest.tokens == LONGEST:
        results.result_path("long_needle", ".md").write_text(page)


def written(segment: int, rows: list[dict[str, Any]]) -> str:
    text = "# A needle, far back\n\n" + results.circumstances()
    text += (
        f"\n`{CONFIG}`, {segment:,} tokens a segment; share of the tokens of {EVALUATED} held-out "
        f"answers, of {ANSWER} each, that are right, by how far back the needle lies. Each length "
        f"begins with the weights of the length before. Truncated: four steps for three, since a "
        f"streamed step runs one forward more.\n\n"
    )
    return text + results.table(sorted(rows, key=lambda row: row["training"]))


if __name__ == "__main__":
    main()
