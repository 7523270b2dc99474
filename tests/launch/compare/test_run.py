"""compare: what it measures and in which order, goes on after a stop, and says in words."""

import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.compare import run
from launch.compare.child import Failed
from launch.compare.file import load_comparison
from launch.compare.page import write_comparison
from launch.compare.results import Results
from launch.compare.run import run_comparison
from launch.stop import PREEMPTED

ROOT = Path(__file__).parents[3]


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
        case = call.function.rpartition("_")[2], call.config.model.mixer, call.config.train.seq_len
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


def test_a_stop_is_heard_while_there_is_no_room(comparison_file, monkeypatch):
    @contextmanager
    def full(config, should_stop):
        assert should_stop()
        yield None

    monkeypatch.setattr(run, "cell_gang", full)
    comparison = load_comparison(comparison_file, [])
    assert run_comparison(comparison, lambda _: None, lambda _: True, lambda: True) is None


@pytest.mark.slow
def test_compare_on_ray_interrupted_then_finished(comparison_file, tmp_path, head):
    """The whole verb, two workers, a training for each of two mixers; stopped once on its way."""
    command = [sys.executable, "-m", "launch", "compare", str(comparison_file)]
    command += ["compare.lengths=[64]", "compare.mixers=[attention,[mingru,window]]"]
    command += ["compare.repetitions=1"]  # their order is tested above
    command += ["compare.at_once=2"]  # for one of which there is room
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, cwd=ROOT, env=head.joined, **pipes)
    assert first.stdout
    for line in first.stdout:
        if line.startswith("[2/"):
            first.send_signal(signal.SIGTERM)
            break
    rest = first.stdout.read()
    assert first.wait(300) == PREEMPTED, rest
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
