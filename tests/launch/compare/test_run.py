"""compare: what it measures and in which order, goes on after a stop, and says in words."""

import json
import math
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.compare import run
from launch.compare.child import Call, Failed
from launch.compare.file import load_comparison
from launch.compare.findings import _crossing, _loss_at
from launch.compare.measurements import Cost
from launch.compare.page import write_comparison
from launch.compare.results import Point, Results, TrainingRecord, best_runs, by_rate
from launch.compare.run import run_comparison
from launch.compare.search import beyond
from launch.gang import LaunchError
from launch.stop import PREEMPTED
from trainer.config import Config
from trainer.measure import ReadingCost, TrainingCost

ROOT = Path(__file__).parents[3]


@pytest.fixture
def comparison_file(tmp_path: Path, dataset: Path) -> Path:
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"""
compare:
  dir: {tmp_path / "out"}
  mixers: [attention, mingru, [mingru, window]]
  lengths: [64, 128, 256]
  tokens_per_step: 256
  micro_batch_tokens: 128
  repetitions: 2
  steps: 2
  seconds: 0.1
  decode_tokens: 4
  tasks:
    text: [train.steps=4, train.seq_len=64, train.batch_size=2]
data: {{path: {dataset}}}
model: {{layers: 2, width: 32, heads: 2, window: 16}}
parallel: {{sp: 2}}
evaluate: {{sequences: 2, every: 2}}
launch: {{workers: 2}}
"""
    )
    return path


class FakeGang:
    """Attention slows down with length and fails at 256; the others take one time a token."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int]] = []

    def hardware(self) -> str:
        return "a machine of the test"

    def measure(self, call: Call, alone: bool) -> list[Cost | Failed]:
        train, attention = call.config.train, call.config.model.mixer == "attention"
        length, kind = train.seq_len, _kind(call)
        self.calls.append((kind, call.config.model.mixer, length))
        if attention and length == 256:
            return [Failed("stopped"), Failed("out of memory")]
        per_token = length * 1e-4 if attention else 1e-2
        if kind == "reading":
            assert alone
            return [ReadingCost(1.0, 1 / per_token, 2048, 2**30, 0)]
        tokens = train.batch_size * length
        steps = [tokens * per_token * f for f in (1, 3, 1)]
        return [TrainingCost(steps, 0.1, 64, n * 2**30, 0, None, 1e9) for n in (1, 2)]


def _kind(call: Call) -> str:
    return call.function.rpartition("_")[2]


@pytest.fixture
def gang(monkeypatch) -> FakeGang:
    fake = FakeGang()

    @contextmanager
    def cell_gang(config):
        yield fake

    monkeypatch.setattr(run, "cell_gang", cell_gang)
    return fake


def _train(config: Config, slow: float = 1.0) -> bool:
    """As a training leaves its folder: attention wants a rate of 1e-3, the others of 4e-3."""
    run, rate = Path(config.run.dir), config.optim.learning_rate
    run.mkdir(parents=True)
    best = 1e-3 if config.model.mixer == "attention" else 4e-3
    loss = 2.0 + abs(math.log2(rate / best)) + config.run.seed / 100
    steps = [
        {"step": n, "tokens": 64 * n, "step_seconds": seconds * slow, "loss": loss + 1 / n}
        for n, seconds in ((1, 9), (2, 1), (3, 2), (4, 1))
        if n <= config.train.steps
    ]
    evaluations = [{"step": n, "loss": loss + 1 - n / 4} for n in (2, 4) if n <= len(steps)]
    evaluations = evaluations or [{"step": 1, "loss": loss + 1}]
    for name, lines in (("metrics", steps), ("evaluations", evaluations)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = {"step": config.train.steps, "loss": loss, "accuracy": 0.5, "baselines": {}}
    final |= {"by_distance": [], "by_position": [[0, 16, loss + 0.1]]}
    final |= {"bits_per_byte": loss, "tokens": 64}
    (run / "evaluation.json").write_text(json.dumps(final))
    return True


def _run(path: Path, *overrides: str, stop_after: float = float("inf")) -> Results | None:
    """A comparison without its trainings, asked to stop after so many cells."""
    comparison = load_comparison(path, ["compare.tasks={}", *overrides])
    shown: list[str] = []
    return run_comparison(
        comparison, shown.append, lambda _: True, lambda: len(shown) >= stop_after
    )


def test_repetitions_are_interleaved_and_lost_cells_not_tried_again(comparison_file, gang):
    _run(comparison_file)
    training = [(mixer, length) for what, mixer, length in gang.calls if what == "training"]
    hybrid = ["mingru", "window"]
    first = [(m, n) for n in (64, 128, 256) for m in ("attention", "mingru", hybrid)]
    second = [(m, n) for n in (64, 128, 256) for m in ("mingru", hybrid, "attention")]
    assert training == [*first, *(cell for cell in second if cell != ("attention", 256))]


def test_stopped_and_run_again_measures_the_rest_only(comparison_file, gang):
    assert _run(comparison_file, stop_after=7) is None
    assert len(gang.calls) == 7
    whole = _run(comparison_file)
    assert len(gang.calls) == 36 - 2  # attention at 256 is not tried twice
    assert whole == _run(comparison_file)
    assert len(gang.calls) == 34
    _run(comparison_file, "train.dtype=bf16")  # other figures: nothing of the old ones counts
    assert len(gang.calls) == 68
    _run(comparison_file, "compare.lengths=[64]", "compare.repetitions=3")
    assert len(gang.calls) == 68 + 6


def test_an_accident_costs_its_own_cell_only_and_is_measured_again(comparison_file, gang):
    """Out of time at 64 after 256 had worked: no limit of the mixer."""
    measure, accidents = gang.measure, ["out of time"]

    def unlucky(call, alone):
        case = _kind(call), call.config.model.mixer, call.config.train.seq_len
        if case[1:] == ("mingru", 64) and gang.calls.count(case) == 1 and accidents:
            gang.calls.append(case)
            return [Failed(accidents.pop())]
        return measure(call, alone)

    gang.measure = unlucky
    results = _run(comparison_file)
    assert results
    failed = [cell.visit for cell in _cells(results, "mingru") if cell.failed]
    assert [(visit.length, visit.repetition) for visit in failed] == [(64, 1)]
    calls = len(gang.calls)
    again = _run(comparison_file)
    assert again
    assert len(gang.calls) == calls + 1
    assert not any(cell.failed for cell in _cells(again, "mingru"))


def _cells(results, mixer):
    return [cell for cell in results.cells if cell.visit.label == mixer]


def test_report_has_every_figure_and_says_where_lines_cross(comparison_file, gang, tmp_path):
    results = _run(comparison_file)
    assert results
    shown = write_comparison(tmp_path / "out", results)
    page = (tmp_path / "out" / "report.md").read_text()
    # 1 / (length * 1e-4) against 1 / 1e-2: equal at 100 tokens
    assert "mingru trains faster than attention from about 100 tokens on: 0.64 times its" in page
    assert "mingru decodes faster than attention from about 100 tokens on" in shown
    assert "attention, training: out of memory at 256 tokens." in page
    assert "| 64 | 156 (156 to 156) | 100 (100 to 100) | 100 (100 to 100) |" in page
    assert "| 256 | **out of memory** | 100 (100 to 100) | 100 (100 to 100) |" in page
    assert "| 64 | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00)" in page  # the larger of two workers
    for link in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / "out" / link).stat().st_size > 5000
    flops = results.models["mingru"].training_flops_per_token[64]
    assert f"| {flops * 100 / 1e9:,.0f} |" in page


def test_best_rate_of_each_mixer_counts_and_seeds_show_the_spread(comparison_file, gang, tmp_path):
    overrides = ["compare.learning_rates=[1e-3,2e-3,4e-3]", "compare.seeds=[1,2,5]"]
    overrides += ["compare.lengths=[64]", "compare.published={text: {attention: 1.5, mamba: 1.25}}"]
    overrides += ["compare.published_accuracy={text: {mingru: 0.995}}", "compare.notes=[All tiny.]"]
    comparison = load_comparison(comparison_file, overrides)
    trained: list[tuple[Any, int, float]] = []

    def train(config: Config) -> bool:
        trained.append((config.model.mixer, config.run.seed, config.optim.learning_rate))
        return _train(config)

    assert run_comparison(comparison, lambda _: None, train, lambda: len(trained) == 5) is None
    results = run_comparison(comparison, lambda _: None, train, lambda: False)
    assert results
    # every rate with the first seed, the other seeds at the best; none twice, though stopped
    assert len(trained) == len(set(map(str, trained))) == 3 * 3 + 2 * 3
    mixers = ["attention", "mingru", ["mingru", "window"]]
    assert trained[:4] == [*((m, 1, 1e-3) for m in mixers), ("attention", 1, 2e-3)]
    assert trained[9:] == [
        (m, seed, 1e-3 if m == "attention" else 4e-3) for seed in (2, 5) for m in mixers
    ]
    write_comparison(tmp_path / "out", results)
    page = (tmp_path / "out" / "report.md").read_text()
    best = "2.0200 (2.0100 to 2.0500)"
    assert f"| held-out loss, nats per token | {best} | {best} | {best} |" in page
    assert "| published | 1.500 |  |  |\n" in page
    assert "| published |  | 99.5% |  |\n" in page
    assert "\n- All tiny.\n" in page
    assert "Published besides: mamba 1.25." in page
    assert "| learning rate | 0.001 | 0.004 | 0.004 |" in page
    assert "| 0.001 | 2.0200 (2.0100 to 2.0500) | 4.0100 | 4.0100 |" in page
    assert "| 0 to 15 | 2.1200 | 2.1200 | 2.1200 |" in page  # of the seed in the middle
    assert results.tasks["text"]["mingru"][0].seconds == [1.5, 3, 4.5, 6]  # the median's pace
    assert "text: attention did best at the lowest learning rate tried, 0.001: a lower one" in page
    assert "text: mingru did best at the highest learning rate tried, 0.004: a higher one" in page
    assert "learning rates 0.001, 0.002, 0.004, of which each mixer's best counts" in page


def test_rates_go_on_until_the_best_lies_inside(comparison_file, gang, tmp_path):
    """And slower mixers are trained once more, in the time of the fastest."""
    overrides = ["compare.learning_rates=[2e-3,4e-3]", "compare.more_rates=3", "compare.seeds=[1]"]
    overrides += ["compare.lengths=[64]", "compare.equal_time=true"]
    comparison = load_comparison(comparison_file, overrides)
    trained: list[tuple[Any, float, int]] = []

    def train(config: Config) -> bool:
        rate, mixer = config.optim.learning_rate, config.model.mixer
        trained.append((mixer, rate, config.train.steps))
        if mixer == "mingru" and rate > 7e-3:
            raise LaunchError("the loss is not finite")
        return _train(config, slow=4.0 if mixer == "attention" else 1.0)

    results = run_comparison(comparison, lambda _: None, train, lambda: False)
    assert results
    rates = {label: sorted(by_rate(runs)) for label, runs in results.tasks["text"].items()}
    assert rates["attention"] == [5e-4, 1e-3, 2e-3, 4e-3]  # the best is 1e-3
    assert rates["mingru"] == [2e-3, 4e-3]  # the next one was lost
    assert ("mingru", 8e-3, 4) in trained
    assert ("attention", 1e-3, 1) in trained  # of four steps, in the time of four of the others
    tokens = [run.tokens[-1] for run in results.in_equal_time["text"].values()]
    assert tokens == [64, 256, 256]
    write_comparison(tmp_path / "out", results)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| in 6 s, schedule to its end |" in page
    assert "text: the training of mingru at learning rate 0.008, seed 1 failed: the loss" in page
    assert "text: mingru did best at" not in page  # 0.008 is beyond its best
    assert "text: mingru+window did best at" not in page


def test_the_next_rate():
    assert beyond({1e-3: 2.0, 3e-3: 1.0}) == 9e-3
    assert beyond({1e-3: 1.0, 3e-3: 2.0}) == 3.33e-4
    assert beyond({1e-3: 2.0, 3e-3: 1.0, 9e-3: math.inf}) is None
    assert beyond({1e-3: math.inf}) == 3.33e-4
    assert beyond({1e-3: math.inf, 3e-3: 2.0, 1e-2: math.inf}) is None


def test_crossing_is_told_as_it_is():
    def said(*ratios):
        return _crossing(("x", "attention"), "trains faster than", "its speed", list(ratios))

    assert "from about 200 tokens on" in said((100, 0.5), (400, 2.0))
    assert "only up to about 200 tokens" in said((100, 2.0), (400, 0.5))
    assert "at every length measured" in said((100, 1.5), (400, 2.0))
    assert "cross at about 200 and 800" in said((100, 2.0), (400, 0.5), (1600, 2.0))
    assert "at no length measured" in said((100, 0.5), (400, 0.9))
    assert "measured together at no length" in said()
    assert "attention at every length measured: 1.50 times its speed at 100 tokens." in said(
        (100, 1.5)
    )
    less = _crossing(
        ("x", "attention"), "trains in less memory than", "its memory", [(1, 2.0), (2, 4.0)]
    )
    assert "0.50 times its memory at 1 tokens, 0.25 times at 2" in less


def test_a_loss_that_is_no_number_is_no_best():
    runs = [
        TrainingRecord(rate, 0, [], [], [], [], {"loss": loss})
        for rate, loss in ((1e-4, math.nan), (1e-3, 2.0))
    ]
    assert [run.learning_rate for run in best_runs(runs)] == [1e-3]


def test_loss_at_a_time_lies_between_evaluations():
    points = [Point(0, 2, 4.0), Point(0, 4, 2.0)]
    run = TrainingRecord(1e-3, 0, [], [], [], points, {})
    assert [_loss_at(run, t) for t in (1, 2, 3, 4, 9)] == [None, 4, 3, 2, 2]


@pytest.mark.slow
def test_compare_on_ray_interrupted_then_finished(comparison_file, tmp_path, head):
    """The whole verb, two workers, a training for each of two mixers; stopped once on its way."""
    command = [sys.executable, "-m", "launch", "compare", str(comparison_file)]
    command += ["compare.lengths=[64]", "compare.mixers=[attention,[mingru,window]]"]
    command += ["compare.repetitions=1"]  # their order is tested above
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, cwd=ROOT, env=head.joined, **pipes)
    assert first.stdout
    for line in first.stdout:
        if line.startswith("[2/"):
            first.send_signal(signal.SIGTERM)
            break
    rest = first.stdout.read()
    assert first.wait(60) == PREEMPTED, rest
    assert "the same command goes on" in rest
    before = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert 2 <= len(before) < 4

    done = subprocess.run(command, cwd=ROOT, env=head.joined, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert len(after) == 4
    assert before.items() <= after.items()
    assert not any("failed" in record for record in after.values())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    training = [cell for cell in results["cells"] if cell["what"] == "training"]
    assert all(cell["exchange_bytes"] > 0 for cell in training)
    (curve,) = results["tasks"]["text"]["mingru+window"]
    assert [point["tokens"] for point in curve["held_out"]] == [256, 512]
    assert curve["tokens"] == [128, 256, 384, 512]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "text, held-out loss after 512 tokens, best first:" in page
    assert "text_loss_seconds.png" in page
    assert "(loss_by_position.png)" in page
    assert (tmp_path / "out" / "loss_by_position.png").exists()
    assert "unigram" in page
