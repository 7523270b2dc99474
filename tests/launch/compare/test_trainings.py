"""The trainings of a comparison: rates, then seeds, each once; what is lost is told."""

import json
import math
import re
from pathlib import Path
from threading import Barrier
from typing import Any

from launch.compare import trainings
from launch.compare.file import load_comparison
from launch.compare.page import write_comparison
from launch.compare.results import by_rate
from launch.compare.run import run_comparison
from launch.compare.search import beyond
from launch.gang import LaunchError
from trainer.config import Config

ROOT = Path(__file__).parents[3]


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


def test_trainings_run_side_by_side_and_find_the_same(comparison_file, gang):
    """The rates of all mixers at once, then the seeds; a stop leaves none behind."""
    overrides = ["compare.learning_rates=[1e-3,4e-3]", "compare.seeds=[1,2]"]
    overrides += ["compare.lengths=[64]", "compare.at_once=3"]
    comparison = load_comparison(comparison_file, overrides)
    together = Barrier(3, timeout=60)

    def train(config: Config) -> bool:
        together.wait()
        return _train(config)

    asked = [False]

    def stopped(config: Config) -> bool:
        together.wait()
        asked[0] = True
        return False

    begun: list[str] = []
    assert run_comparison(comparison, begun.append, stopped, lambda: asked[0]) is None
    assert sum(" on text, in " in shown for shown in begun) == 3
    side_by_side = run_comparison(comparison, lambda _: None, train, lambda: False)
    overrides += ["compare.at_once=1", f"compare.dir={comparison.settings.dir}-1"]
    alone = load_comparison(comparison_file, overrides)
    one_by_one = run_comparison(alone, lambda _: None, _train, lambda: False)
    assert side_by_side
    assert one_by_one
    assert side_by_side.tasks == one_by_one.tasks
    rates = [run.learning_rate for run in side_by_side.tasks["text"]["mingru"]]
    assert rates == [1e-3, 4e-3, 4e-3]


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
    assert "| in 6 s, schedule to its end, first seed |" in page
    assert "text: the training of mingru at learning rate 0.008, seed 1 failed: the loss" in page
    assert "text: mingru did best at" not in page  # 0.008 is beyond its best
    assert "text: mingru+window did best at" not in page


def test_a_first_seed_that_was_lucky_decides_nothing(comparison_file, gang, tmp_path):
    """The rate that is better over all seeds counts, and has had all of them."""
    overrides = ["compare.learning_rates=[1e-3,2e-3,4e-3]", "compare.seeds=[0,1,2]"]
    overrides += ["compare.lengths=[64]", "compare.mixers=[mingru]"]
    comparison = load_comparison(comparison_file, overrides)

    def train(config: Config) -> bool:
        _train(config)
        rate, lucky = config.optim.learning_rate, config.run.seed == 0
        loss = {1e-3: 2.5, 2e-3: 1.0 if lucky else 3.0, 4e-3: 2.0}[rate] + config.run.seed / 100
        path = Path(config.run.dir) / "evaluation.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "loss": loss}))
        return True

    results = run_comparison(comparison, lambda _: None, train, lambda: False)
    assert results
    runs = by_rate(results.tasks["text"]["mingru"])
    assert {rate: len(same) for rate, same in runs.items()} == {1e-3: 1, 2e-3: 3, 4e-3: 3}
    write_comparison(tmp_path / "out", results)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| held-out loss, nats per token | 2.0100 (2.0000 to 2.0200) |" in page
    assert "| learning rate | 0.004 |" in page


def test_right_answers_count_before_losses(comparison_file, gang, tmp_path, monkeypatch):
    """Beyond the lengths it learned a model that is seldom wrong is so for sure: its loss is high.

    A rate at which everything is a guess has the lower one.
    """
    monkeypatch.setattr(trainings, "asks_questions", lambda _: True)
    overrides = ["compare.learning_rates=[1e-3,2e-3,4e-3]", "compare.seeds=[0,1,2]"]
    overrides += ["compare.lengths=[64]", "compare.mixers=[mingru,attention]"]
    comparison = load_comparison(comparison_file, overrides)

    def train(config: Config) -> bool:
        _train(config)
        rate, attention = config.optim.learning_rate, config.model.mixer == "attention"
        right = {1e-3: 0.5, 2e-3: 0.9, 4e-3: 0.5}[rate] - config.run.seed / 100 - attention / 10
        loss = {1e-3: 0.7, 2e-3: 4.0, 4e-3: 0.6}[rate]
        run = Path(config.run.dir)
        final = json.loads((run / "evaluation.json").read_text())
        final |= {"loss": loss, "accuracy": right}
        (run / "evaluation.json").write_text(json.dumps(final))
        points = [{"step": 2, "loss": 1, "accuracy": 0.5}]
        points.append({"step": 4, "loss": loss, "accuracy": right})
        (run / "evaluations.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
        return True

    results = run_comparison(comparison, lambda _: None, train, lambda: False)
    assert results
    runs = by_rate(results.tasks["text"]["mingru"])
    assert {rate: len(same) for rate, same in runs.items()} == {1e-3: 1, 2e-3: 3, 4e-3: 1}
    write_comparison(tmp_path / "out", results)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| learning rate | 0.002 | 0.002 |" in page
    assert "| accuracy | 89.0% (88.0% to 90.0%) | 79.0% (78.0% to 80.0%) |" in page
    assert "accuracy at a learning rate of" in page
    assert "right answers after 256 tokens, the median of 3 seeds, best first: mingru 89.0%" in page
    assert "right answers after 6 s of training steps, best first: mingru 89.0%, att" in page


def test_the_next_rate():
    lost = (math.inf,)
    assert beyond({1e-3: (2.0,), 3e-3: (1.0,)}) == 9e-3
    assert beyond({1e-3: (1.0,), 3e-3: (2.0,)}) == 3.33e-4
    assert beyond({1e-3: (0.1, 2.0), 3e-3: (0.2, 1.0)}) == 3.33e-4
    assert beyond({1e-3: (2.0,), 3e-3: (1.0,), 9e-3: lost}) is None
    assert beyond({1e-3: lost}) == 3.33e-4
    assert beyond({1e-3: lost, 3e-3: (2.0,), 1e-2: lost}) is None


def test_a_line_that_is_lost_costs_no_comparison(comparison_file, gang, tmp_path):
    """Power went before metrics.jsonl reached the disk; or all of it was lost."""
    overrides = ["compare.lengths=[64]", "compare.mixers=[attention,mingru]"]
    comparison = load_comparison(comparison_file, overrides)

    def train(config: Config) -> bool:
        _train(config)
        metrics = Path(config.run.dir) / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True)
        kept = [0, 2] if config.model.mixer == "mingru" else []
        metrics.write_text("".join(lines[n] for n in kept))
        return True

    results = run_comparison(comparison, lambda _: None, train, lambda: False)
    assert results
    (run,) = results.tasks["text"]["mingru"]
    assert [point.tokens for point in run.held_out] == [64, 192]
    assert "attention" not in results.tasks["text"]
    (why,) = results.lost["text"].values()
    assert "has no metrics or evaluations" in why
    assert "remove" in why


def test_what_is_written_is_json_of_any_reader(comparison_file, gang, tmp_path):
    overrides = ["compare.lengths=[64]", "compare.mixers=[attention]", "compare.more_rates=0"]
    comparison = load_comparison(comparison_file, overrides)

    def train(config: Config) -> bool:
        _train(config)
        for name in ("evaluations.jsonl", "evaluation.json"):
            path = Path(config.run.dir) / name
            path.write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', path.read_text()))
        return True

    results = run_comparison(comparison, lambda _: None, train, lambda: False)
    assert results
    write_comparison(tmp_path / "out", results)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "out" / "results.json").read_text()
    raw = json.loads(text, parse_constant=refuse)
    assert raw["tasks"]["text"]["attention"][0]["held_out"][0]["loss"] is None
