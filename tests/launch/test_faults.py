"""make test-faults: processes and machines are lost at random moments, and the run that comes out
is the run that would have been.

Writes tests/benchmarks/results/faults_*.csv and .md.
"""

import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.stop import PREEMPTED
from tests.benchmarks import results
from tests.launch.conftest import ROOT, Machines, wait_for, without_ray
from tests.launch.test_launch import TRAIN
from tests.trainer.runs import run as run_ranks
from tests.trainer.test_resume import _assert_identical
from trainer import checkpoint
from trainer.run_folder import RunFolder, read_lines

pytestmark = pytest.mark.slow

# what is found by a word of its command line, and the signal that it gets
FAULTS = {
    "worker killed": ("ray::Rank", signal.SIGKILL),
    "worker stopped": ("ray::Rank", signal.SIGSTOP),
    "machine lost (its raylet)": ("raylet/raylet", signal.SIGKILL),
    "Ray's control service killed": ("gcs_server", signal.SIGKILL),
    "the process that speaks with Ray": ("launch.driver", signal.SIGKILL),
}
SILENCE = ["launch.silence_seconds=5", "parallel.timeout_seconds=20"]
PAGE = """Each try is a fault at a random moment of a run of two workers; the time is from it to
the first new step after it. A stopped worker is found after launch.silence_seconds 5. Afterwards
the losses, sequences, weights and optimizer states of the run were those of a run that was left
alone: to the bit where the layout stayed, to rounding where it changed, with no line missing or
double."""
ROWS: dict[tuple[str, str], list[float]] = {}  # (fault, kind of run): recovery seconds of each try


@pytest.fixture(scope="module", autouse=True)
def _page(request: pytest.FixtureRequest) -> Iterator[None]:
    circumstances = results.circumstances()  # the tree as it was
    yield
    if not ROWS or request.session.testsfailed:
        return
    rows = [
        {
            "fault": fault,
            "run": run,
            "tries": len(seconds),
            "runs lost or changed": 0,  # else there would be no page
            "median, s": round(statistics.median(seconds), 1),
            "worst, s": round(max(seconds), 1),
        }
        for (fault, run), seconds in sorted(ROWS.items())
    ]
    results.write_csv("faults", rows)
    command = "- command: `make test-faults`"
    said = [command, *circumstances.splitlines()[1:]]
    results.result_path("faults", ".md").write_text(
        "\n".join(["# Faults, and the way back", "", *said, "", PAGE, "", results.table(rows)])
    )


def _start(config_file: Path, environment: dict[str, str], *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*TRAIN, str(config_file), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _below(driver: subprocess.Popen, word: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _steps(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


def _assert_as_if_left_alone(run: Path, config_file: Path, options: list[str]) -> None:
    """Losses, sequences, weights and optimizer, to the bit; no step missing or double."""
    alone = config_file.parent / "alone"
    run_ranks(config_file, 2, *options, f"run.dir={alone}")
    here, there = RunFolder(run), RunFolder(alone)
    steps = _steps(run)
    assert steps == list(range(1, len(steps) + 1))
    for name in ("metrics", "sequences"):
        pairs = [read_lines(getattr(folder, name)) for folder in (here, there)]
        for mine, theirs in zip(*pairs, strict=True):
            for key in {"step", "loss", "grad_norm", "begins"} & mine.keys():
                assert mine[key] == theirs[key], (name, mine["step"])
    last = [folder.saved()[0] for folder in (here, there)]
    assert last[0].name == last[1].name
    import torch
    from safetensors.torch import load_file

    weights = [load_file(folder / checkpoint.WEIGHTS) for folder in last]
    _assert_identical(*weights)
    for path in sorted((last[0] / "deepspeed").glob("*.pt")):
        states = [
            torch.load(folder / "deepspeed" / path.name, weights_only=False) for folder in last
        ]
        _assert_identical(*states)


def _recovered(run: Path, driver: subprocess.Popen, starts: int) -> float:
    """Seconds until the next start has taken a step."""
    began = time.monotonic()
    folder = RunFolder(run)
    while len(read_lines(folder.starts)) <= starts:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() - began < 120, "did not go on"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 3])
def test_lost_again_and_again(config_file, stage):
    """One run, a fault of every kind in turn at random moments: stepping, saving, starting."""
    tries = int(os.environ.get("LONGHAUL_FAULTS", "20"))
    options = ["launch.workers=2", "parallel.sp=2", "evaluate.sequences=0", "checkpoint.every=5"]
    options += [f"train.steps={tries * 400}", f"deepspeed.zero_stage={stage}", *SILENCE]
    moments = random.Random(stage)
    first, *others = FAULTS
    run = config_file.parent / "run"
    driver = _start(config_file, without_ray(), *options)
    for number in range(tries):
        name = others[number // 2 % len(others)] if number % 2 else first
        word, how = FAULTS[name]
        starts = len(read_lines(run / "starts.jsonl"))
        wait_for(lambda known=starts: len(read_lines(run / "starts.jsonl")) > 0)
        time.sleep(moments.uniform(0.5, 4))
        starts = len(read_lines(run / "starts.jsonl"))
        moments.choice(_below(driver, word)[-2:]).send_signal(how)
        seconds = _recovered(run, driver, starts)
        ROWS.setdefault((name, f"ZeRO {stage}"), []).append(seconds)
    known = len(_steps(run))
    wait_for(lambda: len(_steps(run)) > known + 20)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == PREEMPTED, output
    last = _steps(run)[-1]
    alone = [o for o in options if not o.startswith("train.steps")]
    alone += [f"train.steps={tries * 400}", f"train.stop_after={last}"]
    _assert_as_if_left_alone(run, config_file, alone)


@pytest.mark.soak
def test_nothing_outlives_the_command(config_file):
    """Killed with -9, it leaves no process behind, and the next start goes on at once."""
    options = ["launch.workers=2", "parallel.sp=2", "train.steps=100000", "checkpoint.every=5"]
    run = config_file.parent / "run"
    driver = _start(config_file, without_ray(), *options, "evaluate.sequences=0")
    wait_for(lambda: len(_steps(run)) > 10)
    second = subprocess.run(
        [*TRAIN, str(config_file), *options],
        cwd=ROOT,
        env=without_ray(),
        capture_output=True,
        text=True,
    )
    assert second.returncode == 1  # the second start on one folder is refused, by name
    assert f"run.dir {run} is in use: process " in second.stderr
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(below) > 5
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(below, timeout=10)
    assert not left, [p.cmdline() for p in left]
    options.append("evaluate.sequences=0")
    again = _start(config_file, without_ray(), *options, "train.stop_after=20")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    whole = f"train.stop_after={_steps(run)[-1]}"
    _assert_as_if_left_alone(run, config_file, [*options, whole])


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 3])
def test_a_machine_is_lost_and_comes_back(tmp_path, config_file, stage):
    """launch.min_workers: the run goes on with what is left, and takes the new machine in."""
    machines = Machines()
    try:
        machines.ask("add")
        options = ["launch.workers=2", "launch.min_workers=1", "parallel.sp=2"]
        options += ["checkpoint.every=20", "evaluate.sequences=0", "launch.wait_seconds=3"]
        options += [f"deepspeed.zero_stage={stage}", "train.steps=100000", *SILENCE]
        run = config_file.parent / "run"
        driver = _start(config_file, machines.environment, *options)
        starts = run / "starts.jsonl"

        def workers() -> list[int]:
            return [line["workers"] for line in read_lines(starts)]

        wait_for(lambda: workers()[-1:] == [2] and len(_steps(run)) > 50)
        began = time.monotonic()
        machines.ask("kill")
        wait_for(lambda: workers()[-1] == 1, 120)
        ROWS.setdefault(("a machine of two lost, one worker goes on", f"ZeRO {stage}"), []).append(
            time.monotonic() - began
        )
        at = len(_steps(run))
        wait_for(lambda: len(_steps(run)) > at + 50)
        began = time.monotonic()
        machines.ask("add")
        wait_for(lambda: workers()[-1] == 2, 120)
        ROWS.setdefault(("a new machine taken in", f"ZeRO {stage}"), []).append(
            time.monotonic() - began
        )
        assert read_lines(starts)[-1]["lost_steps"] == 0  # it was taken in at a checkpoint
        driver.send_signal(signal.SIGTERM)
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == PREEMPTED, output
    finally:
        machines.stop()
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    alone = [o for o in options if not o.startswith("launch.")]
    alone += [f"run.dir={tmp_path / 'alone'}", f"train.stop_after={len(lines)}"]
    run_ranks(config_file, 2, *alone)
    for mine, theirs in zip(lines, read_lines(tmp_path / "alone/metrics.jsonl"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # 1e-7 a step adds up
    ours, theirs = (read_lines(folder / "sequences.jsonl") for folder in (run, tmp_path / "alone"))
    assert ours == theirs


@pytest.mark.soak
def test_a_drained_machine_is_left_and_a_time_limit_kept(config_file):
    """Both after a checkpoint of the last step: no step is lost. The limit exits with 75."""
    machines = Machines()
    run = config_file.parent / "run"
    try:
        machines.ask("add")
        options = ["launch.workers=2", "launch.min_workers=1", "parallel.sp=2"]
        options += ["evaluate.sequences=0", "launch.wait_seconds=3", "train.steps=1000000"]
        driver = _start(config_file, machines.environment, *options, "run.max_seconds=60")
        began = time.monotonic()
        wait_for(lambda: len(_steps(run)) > 50)
        asked = time.monotonic()
        machines.drain()
        wait_for(lambda: len(read_lines(run / "starts.jsonl")) == 2, 120)
        ROWS.setdefault(("a machine drained, one worker goes on", "ZeRO 0"), []).append(
            time.monotonic() - asked
        )
        second = read_lines(run / "starts.jsonl")[1]
        assert (second["workers"], second["lost_steps"]) == (1, 0)
        output, _ = driver.communicate(timeout=300)
        assert time.monotonic() - began < 75
    finally:
        machines.stop()
    assert driver.returncode == PREEMPTED, output
    assert "is to be taken away: going on from the checkpoint just written" in output
    assert "run.max_seconds have passed" in output
    steps = _steps(run)
    assert steps == list(range(1, len(steps) + 1))
    assert RunFolder(run).saved()[0] == RunFolder(run).checkpoint(steps[-1])
