"""A step's figures: rates by hand, files that survive a lost run, and what TensorBoard shows."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.flops import training_flops_per_token
from trainer import metrics as metrics_module
from trainer.config import load_config
from trainer.metrics import MetricsWriter, step_metrics
from trainer.run_folder import RunFolder, read_lines, truncate_after
from trainer.worker import Worker


def _worker(config_file, monkeypatch) -> Worker:
    config = load_config(config_file, ["launch.workers=2", "parallel.sp=2"])

    class Alone:
        first, sp_rank = True, 0

    return Worker(config, torch.device("cpu"), Alone())


def test_rates_follow_from_the_seconds(config_file, monkeypatch):
    """Two sequences of 192 tokens in half a second, on two workers."""
    worker = _worker(config_file, monkeypatch)
    line = step_metrics(worker, {"step": 7, "seq_len": 192, "loss": 1.5, "step_seconds": 0.5})
    assert line == {
        "step": 7,
        "seq_len": 192,
        "loss": 1.5,
        "step_seconds": 0.5,
        "tokens_per_second": 768.0,
        "tokens_per_second_per_worker": 384.0,
        "mfu": None,  # nobody knows a processor's peak
    }
    monkeypatch.setattr(metrics_module, "peak_flops", lambda device: 1e9)
    worker.config.model.mixer = "attention"
    for length in (192, 48):  # a curriculum's
        flops = training_flops_per_token(worker.config.model, length)
        told = step_metrics(worker, {"seq_len": length, "step_seconds": 0.5})["mfu"]
        assert told == pytest.approx(flops * 384 / 1e9)


def test_what_a_lost_run_wrote_after_its_checkpoint_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, 0)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": float(step), "mfu": None})
    writer.close()
    with folder.metrics.open("a") as f:
        f.write('{"step": 4, "lo')  # killed in the middle of a line
    folder.forget_after(2)
    writer = MetricsWriter(folder, 2)
    writer.write({"step": 3, "loss": 30.0, "mfu": None})
    writer.close()
    assert [line["loss"] for line in read_lines(folder.metrics)] == [1.0, 2.0, 30.0]
    board = EventAccumulator(str(folder.tensorboard / tmp_path.name)).Reload()
    assert board.Tags()["scalars"] == ["loss/train"]  # no step, and nothing that is not known
    losses = {event.step: event.value for event in board.Scalars("loss/train")}
    assert losses == {1: 1.0, 2: 2.0, 3: 30.0}


def test_lines_of_a_file_that_is_not_there(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []
    truncate_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_full_precision_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, 0)
    writer.write({"step": 1, "loss": 0.1 + 0.2})
    writer.close()
    assert json.loads(folder.metrics.read_text())["loss"] == 0.1 + 0.2
