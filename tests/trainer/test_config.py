"""Every fault of a configuration is told at once, with its place and the nearest known key."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.compare.file import load_comparison
from trainer.config import dump_config, load_config, load_dumped
from trainer.settings import ConfigError

FAULTY = """\
run:
  dir: {run}
train:
  seq_lenn: 5
  steps: many
  seq_len: 193
parallel: {{sp: 2}}
data: {{path: nowhere}}
launch: {{workers: 3}}
modle: 3
"""


def test_all_faults_together_with_file_line_and_nearest_key(tmp_path, monkeypatch):
    path = tmp_path / "bad.yaml"
    path.write_text(FAULTY.format(run=path / "below-a-file"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["model.with=3", "train.dtype=fp16", "oops", "model.mixer=[mingru, gru]"])
    text = str(caught.value)
    for expected in (
        f"{path}:4: train.seq_lenn: unknown key; the nearest known one is train.seq_len",
        f"{path}:5: train.steps: 'many' is not of type int",
        f"{path}:6: train.seq_len: 193 is not divisible by parallel.sp 2: use 192",
        f"{path}:7: parallel.sp: 2 does not divide launch.workers 3: use 2 workers",
        f"{path}:8: data.path: nowhere holds no dataset.json",
        f"{path}:10: modle: unknown key",
        f"{path}:2: run.dir: {path / 'below-a-file'} cannot be made: {path} is not a folder",
        "command line: model.with: unknown key; the nearest known one is model.width",
        "command line: train.dtype: 'fp16' is not fp32 or bf16",
        "command line: oops: an override is written key=value",
        "command line: model.mixer: 'gru' is not one of mingru, minlstm",
    ):
        assert expected in text
    assert len(caught.value.faults) == 11


@pytest.mark.slow
def test_faults_are_told_in_under_two_seconds_by_the_command(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("train: {stepz: 3}\ndata: {path: nowhere}\n")
    command = [sys.executable, "-m", "launch", "train", str(path)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert time.monotonic() - started < 2
    assert done.returncode == 1
    assert "train.stepz: unknown key; the nearest known one is train.steps" in done.stderr
    assert "2 faults" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=3", "3 is not divisible by dp 2 * train.micro_batch_size 1: use 4"),
        ("model.vocab_size=100", "100 is below the 256 tokens"),
        ("train.seq_len=1000000", "needs 1000001 tokens"),
        ("evaluate.sequences=1 train.seq_len=40000", "the held-out split of"),
        ("train.segment_len=64", "streamed segments are not built yet"),
        ("deepspeed.zero_stage=4", "4 is not 0, 1, 2 or 3"),
        ("parallel.sp=4 train.seq_len=8 launch.workers=4", "gives shards of 2 tokens"),
        ("checkpoint.keep=0", "0 is not positive"),
        ("optim.beta2=1.0", "1.0 is not below 1"),
        ("model=3", "this is a section"),
        ("data.path=s3://bucket/x", "needs a local folder here"),
        ("run.dir=s3://bucket/x", "is an address: a run writes into a folder"),
        ("model.conv_width=1", "is not 0 (off) or at least 2"),
        ("model.mixer=[[mingru,window],attention]", "['mingru', 'window'] is not one of"),
    ],
)
def test_single_faults(config_file, override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["launch.workers=2", *override.split()])
    assert said in str(caught.value)


def test_a_run_keeps_what_its_numbers_depend_on(config_file, tmp_path):
    config = load_config(config_file, [])
    run = Path(config.run.dir)
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    dump_config(config, run / "config.yaml")
    assert load_dumped(run / "config.yaml") == config
    load_config(config_file, ["parallel.sp=1", "launch.workers=2", "train.steps=9"])
    with pytest.raises(ConfigError, match="would resume: keep it"):
        load_config(config_file, ["model.width=24"])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1", "train:\n  steps: 3\n  steps: 4\n"])
def test_broken_files_are_told(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path, ["data.path=nowhere"])


def test_shipped_configurations_are_valid(dataset, tmp_path):
    """On the tests' data; comparisons without their trainings, whose data they name themselves."""
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        if path.name.startswith("compare"):
            comparison = load_comparison(path, ["compare.tasks={}"])
            assert comparison.settings.tasks == {}
            assert {"attention", "mingru", "minlstm"} <= set(comparison.models)
            with pytest.raises(ConfigError) as caught:  # of its trainings only the data is missing
                load_comparison(path, [f"data.path={dataset}/none"])
            assert all("holds no dataset.json" in fault for fault in caught.value.faults)
        else:
            changes = ["train.seq_len=192", f"data.path={dataset}"]
            load_config(
                path, [*changes, f"run.dir={tmp_path / path.stem}"]
            )  # not a run of the user's


def test_faults_of_recovery_are_told_before_any_worker_starts(config_file):
    options = ["launch.workers=2", "launch.min_workers=3", "checkpoint.remote=nowhere://bucket/run"]
    options += ["checkpoint.every_seconds=60", "checkpoint.failures_per_day=2"]
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, options)
    said = str(caught.value)
    assert "launch.min_workers: 3 is above launch.workers 2" in said
    assert "checkpoint.remote: nowhere://bucket/run cannot be used: Protocol not known" in said
    assert "checkpoint.failures_per_day: it chooses checkpoint.every_seconds" in said
