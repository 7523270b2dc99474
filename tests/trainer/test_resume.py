"""Stopped, killed, or moved to other workers: a run goes on as if nothing had happened."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data_prep.schema import load_info
from tests.distributed import run_distributed
from tests.trainer.runs import figures, run, started_at, train_here
from trainer import checkpoint
from trainer.config import ConfigError, dump_config, load_config
from trainer.events import silent
from trainer.run_folder import RunFolder
from trainer.step import build_engine
from trainer.worker import Worker

pytestmark = pytest.mark.slow

STEPS = 6


def _state(run_dir: Path) -> dict[str, Any]:
    """Everything of the last checkpoint: weights and DeepSpeed's optimizer state, per file."""
    folder = RunFolder(run_dir).checkpoint(STEPS)
    state: dict[str, Any] = dict(load_file(folder / checkpoint.WEIGHTS))
    for path in sorted((folder / "deepspeed").glob("*.pt")):
        state[path.name] = torch.load(path, weights_only=False)
    return state


def _assert_identical(a: Any, b: Any, where: str = "") -> None:
    """To the bit, through nested containers; only paths and DeepSpeed's own notes may differ."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("ds_config", "mpu"):
                _assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_identical(x, y, f"{where}/{i}")
    elif isinstance(a, int | float | str | bool | type(None)):
        assert a == b, where


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stopped_and_started_again_is_bitwise(config_file, stage, dtype):
    """Parameters, optimizer and remaining losses, after a stop in the middle of an epoch."""
    base = [
        f"train.steps={STEPS}",
        "parallel.sp=2",
        f"deepspeed.zero_stage={stage}",
        f"train.dtype={dtype}",
        "evaluate.sequences=0",
    ]
    whole, halves = config_file.parent / "whole", config_file.parent / "halves"
    straight = run(config_file, 2, *base, f"run.dir={whole}")
    first = run(config_file, 2, *base, f"run.dir={halves}", "train.stop_after=3")
    second = run(config_file, 2, *base, f"run.dir={halves}")
    assert started_at(second) == 3
    assert figures(first) + figures(second) == figures(straight)
    _assert_identical(_state(whole), _state(halves))
    assert len((halves / "metrics.jsonl").read_text().splitlines()) == STEPS


def test_dropout_is_drawn_again_after_a_stop(config_file):
    """Each step's masks follow from seed, step and rank; an evaluation drops nothing."""
    base = [f"train.steps={STEPS}", "parallel.sp=2", "model.dropout=0.2", "evaluate.sequences=2"]
    whole, halves = config_file.parent / "whole", config_file.parent / "halves"
    straight = run(config_file, 2, *base, f"run.dir={whole}")
    first = run(config_file, 2, *base, f"run.dir={halves}", "train.stop_after=3")
    second = run(config_file, 2, *base, f"run.dir={halves}")
    assert figures(first) + figures(second) == figures(straight)
    results = [(folder / "evaluation.json").read_text() for folder in (whole, halves)]
    assert results[0] == results[1]
    kept = run(config_file, 2, *base, "model.dropout=0", f"run.dir={config_file.parent / 'kept'}")
    assert figures(kept)[0] != figures(straight)[0]


def _train_and_die(config_file: Path, overrides: list[str]) -> None:
    """Rank 1 is killed while it seals its files of the second checkpoint."""
    seal, sealed = checkpoint._seal, []

    def dying_seal(path: Path) -> dict[str, Any]:
        sealed.append(path)
        if "step-000004" in str(path) and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return seal(path)

    checkpoint._seal = dying_seal
    train_here(config_file, overrides)


def test_killed_in_the_middle_of_a_save_is_bitwise(config_file):
    """The half-written checkpoint does not exist; the run goes on from the one before it."""
    base = [f"train.steps={STEPS}", "parallel.sp=2", "deepspeed.zero_stage=2"]
    base += ["checkpoint.every=2", "evaluate.sequences=0"]
    whole, killed = config_file.parent / "whole", config_file.parent / "killed"
    straight = run(config_file, 2, *base, f"run.dir={whole}")
    with pytest.raises(AssertionError, match="rank 1:\nits process died"):
        run_distributed(_train_and_die, 2, config_file, [*base, f"run.dir={killed}"], fresh=True)
    whole_one, *torn = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert whole_one == "step-000002"
    assert torn in (["step-000004.tmp"], [])  # the other rank may have lived to clear it away
    second = run(config_file, 2, *base, f"run.dir={killed}")
    assert started_at(second) == 2
    assert figures(second) == figures(straight)[2:]
    _assert_identical(_state(whole), _state(killed))
    assert not list((killed / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [  # every change at two stages, every stage with two or three
        *((0, (2, 2), (1, 1)), (3, (2, 2), (1, 1)), (1, (2, 1), (1, 1)), (3, (2, 1), (1, 1))),
        *((2, (1, 1), (2, 2)), (3, (1, 1), (2, 2)), (0, (2, 2), (2, 1)), (2, (2, 2), (2, 1))),
        *((1, (4, 2), (2, 2)), (3, (4, 2), (2, 2))),
    ],
)
def test_goes_on_with_other_workers(config_file, stage, before, after):
    """Another sp, another dp, both ways: the same losses to fp32 rounding, data position included.

    The universal conversion happens unasked. Tolerance as in test_parity.
    """
    base = [f"train.steps={STEPS}", f"deepspeed.zero_stage={stage}", "evaluate.sequences=0"]
    straight = run(config_file, 1, *base, f"run.dir={config_file.parent / 'straight'}")
    moved = f"run.dir={config_file.parent / 'moved'}"
    first = run(
        config_file, before[0], *base, moved, f"parallel.sp={before[1]}", "train.stop_after=3"
    )
    second = run(config_file, after[0], *base, moved, f"parallel.sp={after[1]}")
    assert started_at(second) == 3
    actual, expected = figures(first) + figures(second), figures(straight)
    for got, want in zip(actual, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert not list((config_file.parent / "moved" / "checkpoints").glob("*.universal"))


def _clipped_after(config_file: Path, options: list[str], clip: str) -> float:
    """On every rank: what the optimizer clips by, started again with another clip."""
    train_here(config_file, [*options, "train.stop_after=1"])
    config = load_config(config_file, [*options, clip], workers=dist.get_world_size())
    worker = Worker.join(config, silent)
    saved = checkpoint.find(RunFolder(config.run.dir), worker.topology, print)
    return build_engine(worker, saved)._engine.optimizer.clip_grad


@pytest.mark.parametrize("stage", [1, 2])
def test_a_clip_that_is_changed_is_obeyed(config_file, stage):
    """DeepSpeed's optimizer brings the clip of before with its state."""
    options = ["train.steps=2", f"deepspeed.zero_stage={stage}", "optim.clip=1.0"]
    found = run_distributed(_clipped_after, 1, config_file, options, "optim.clip=0.25", fresh=True)
    assert found == [0.25]


def test_a_run_begins_with_the_weights_of_another(config_file):
    """At another length, batch, stage and number of workers, with an optimizer of its own."""
    first = config_file.parent / "first"
    run(config_file, 2, f"run.dir={first}", "train.steps=3", "parallel.sp=2")
    weights = load_file(RunFolder(first).checkpoint(3) / checkpoint.WEIGHTS)
    begun = [f"train.init_from={first}", "train.seq_len=96", "train.batch_size=4"]
    others = ["train.micro_batch_size=2", "deepspeed.zero_stage=3", "train.steps=1"]
    still = "optim.learning_rate=1e-12"
    second = config_file.parent / "second"
    run(config_file, 1, f"run.dir={second}", *begun, *others, still)
    taken = load_file(RunFolder(second).checkpoint(1) / checkpoint.WEIGHTS)
    assert weights.keys() == taken.keys()
    for name in weights:
        torch.testing.assert_close(taken[name], weights[name], rtol=0, atol=1e-9)
    # once it has a checkpoint of its own it goes on from that
    on = [f"run.dir={second}", *begun, *others[:2], "train.steps=2"]
    assert started_at(run(config_file, 1, *on)) == 1


OTHER_TOKENS = ["train.steps=3"]  # and the run's folder names another tokenizer


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["train.init_from=nowhere"], "nowhere is not the folder of a run"),
        (["model.width=24"], "model.width: 24 differs from 16"),
        (["model.mixer=minlstm"], "model.mixer: 'minlstm' differs from 'mingru'"),
        (["model.dropout=0.1"], None),
        (OTHER_TOKENS, r"train\.init_from: .* are not of one tokenizer \(end_of_doc"),
    ],
)
def test_weights_of_another_model_are_refused(config_file, dataset, options, told):
    first = config_file.parent / "first"
    first.mkdir()
    dump_config(load_config(config_file, []), first / "config.yaml")
    if options == OTHER_TOKENS:
        replace(load_info(dataset), end_of_document=0).dump(first)
    begun = [f"train.init_from={first}", *options]
    if told is None:
        assert load_config(config_file, begun).train.init_from == str(first)
        return
    with pytest.raises(ConfigError, match=told):
        load_config(config_file, begun)
