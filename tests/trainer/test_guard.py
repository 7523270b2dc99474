"""What counts as a bad step or as weights that differ, and what is then said and done."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.runs import figures, run, train_here
from trainer import step, train
from trainer.config import Config
from trainer.engine import Engine
from trainer.guard import Guard, ReplicaError, RunError, compare_replicas, weights_checksum
from trainer.run_folder import read_lines


def _config(**guard: object) -> Config:
    config = Config()
    config.launch.workers, config.parallel.sp, config.train.batch_size = 4, 2, 4
    for name, value in guard.items():
        setattr(config.guard, name, value)
    return config


def _shares(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_loss_that_is_not_finite_names_worker_step_and_sequences():
    guard = Guard(_config(), [], 0)
    with pytest.raises(RunError) as caught:
        guard.takes_loss(_shares(1, 1, 1, math.nan), 7, [100, 200, 300, 400])
    said = str(caught.value)
    assert "the loss is nan at step 7 of worker 3, in the sequences from token 200, 400:" in said


def test_a_spike_is_measured_against_the_middle_of_the_last_steps():
    guard = Guard(_config(spike_nats=1.0), [2.0] * 19, 0)
    assert guard.takes_loss(_shares(9, 9, 9, 9), 20, [0] * 4)  # too few before it to know
    guard = Guard(_config(spike_nats=1.0), [2.0] * 19 + [None, 40.0], 0)
    assert guard.takes_loss(_shares(1.4, 1.4, 1.4, 1.4), 21, [0] * 4)  # 2.8
    with pytest.raises(RunError, match=r"loss is 3.2 at step 22 of worker 2, 3, .*2.000 in the"):
        guard.takes_loss(_shares(1, 1, 2, 2.4), 22, [0] * 4)


def test_a_spike_of_squared_errors_is_one_of_their_logarithm():
    config = _config(spike_nats=1.0)
    config.model.observation_width, config.model.action_width = 5, 3
    guard = Guard(config, [0.02] * 20, 0)
    assert guard.takes_loss(_shares(0.05, 0.05, 0.0, 0.0), 21, [0] * 4)  # 2.5 times as much
    with pytest.raises(RunError, match=r"loss is 0.06 at step 22"):
        guard.takes_loss(_shares(0.06, 0.06, 0.0, 0.0), 22, [0] * 4)  # 3


def test_left_out_steps_have_a_limit():
    guard = Guard(_config(on_bad_step="skip", max_skips=2), [], 1)
    assert not guard.takes_norm(math.inf, 5, [0] * 4)
    assert guard.skipped == 2
    with pytest.raises(RunError, match=r"guard\.max_skips 2 steps were left out before it"):
        guard.takes_norm(math.inf, 6, [0] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_flipped_bit_changes_the_checksum(dtype):
    weights = torch.randn(3, 5).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    sums = {weights_checksum([weights, torch.empty(0)])}
    for bit in range(8 * weights.element_size()):
        flipped = weights.clone()
        one = 1 << bit if bit < 8 * weights.element_size() - 1 else -(1 << bit)
        flipped.view(bits)[1, 2] ^= one
        sums.add(weights_checksum([flipped]))
    assert len(sums) == 8 * weights.element_size() + 1


def test_the_odd_one_out_is_named_where_there_is_a_majority():
    compare_replicas([5, 5, 5], ["a", "b", "c"], 3)
    with pytest.raises(ReplicaError, match=r"of worker 1 on b differ from .* after step 3"):
        compare_replicas([5, 4, 5], ["a", "b", "c"], 3)
    with pytest.raises(ReplicaError, match="of worker 0 on a, 1 on b differ"):
        compare_replicas([5, 4], ["a", "b"], 3)


def _flip(config_file: Path) -> str:
    """On every rank: rank 1's memory changes a bit after step 2; what ends the run."""
    take = Engine.step
    steps: list[int] = []

    def flipping(self: Engine, *args: float, **options: bool) -> float:
        norm = take(self, *args, **options)
        steps.append(1)
        if len(steps) == 2 and torch.distributed.get_rank() == 1:
            weight = next(self._engine.module.parameters())
            weight.data.view(torch.int32)[0, 0] ^= 1 << 3
        return norm

    Engine.step = flipping
    try:
        train_here(config_file, ["parallel.sp=3", "guard.checksum_every=3", "checkpoint.every=2"])
    except ReplicaError as error:
        return str(error)
    finally:
        Engine.step = take
    return "nothing"


@pytest.mark.slow
def test_a_flipped_bit_is_found_before_it_is_saved(config_file):
    for said in run_distributed(_flip, 3, config_file):
        assert "the weights of worker 1 on" in said
        assert "after step 2" in said  # the save's own comparison comes before the third step's
    assert not list((config_file.parent / "run" / "checkpoints").glob("step-*"))


def _spoiled(config_file: Path, options: list[str], where: str) -> tuple[list, list]:
    """A run in which rank 1 has a NaN in the third step: in the loss, or in a gradient alone.

    Its events, and the weights before every step.
    """
    accumulate, calls, weights = step.accumulate_gradients, [], []

    def spoil(engine, micro_batches, worker, way):
        calls.append(1)
        weights.append(engine.weights())
        loss = accumulate(engine, micro_batches, worker, way)
        if len(calls) == 3 and worker.topology.rank == 1 and where == "loss":
            return loss * math.nan
        return loss

    backward = Engine.backward

    def spoil_backward(self: Engine, loss: torch.Tensor, *, last: bool) -> None:
        bad = len(calls) == 3 and torch.distributed.get_rank() == 1 and where == "gradient"
        backward(self, loss * math.nan if bad else loss, last=last)

    train.accumulate_gradients, Engine.backward = spoil, spoil_backward
    try:
        return train_here(config_file, options), weights
    finally:
        train.accumulate_gradients, Engine.backward = accumulate, backward


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_is_left_out_at_every_stage(config_file, stage, dtype):
    """The weights after it are those before it: its data are passed over, nothing else."""
    options = ["parallel.sp=2", f"deepspeed.zero_stage={stage}", "train.steps=5"]
    options += [f"train.dtype={dtype}", "guard.on_bad_step=skip", "evaluate.sequences=0"]
    options += ["optim.warmup_steps=0", "optim.final_ratio=1"]
    straight = figures(run(config_file, 2, *options, f"run.dir={config_file.parent / 'straight'}"))
    for where in ("loss", "gradient"):
        here = config_file.parent / where
        events, weights = run_distributed(
            _spoiled, 2, config_file, [*options, f"run.dir={here}"], where
        )[0]
        changed = [
            any(not torch.equal(before[name], after[name]) for name in before)
            for before, after in pairwise(weights)
        ]
        assert changed == [True, True, False, True]
        lines = read_lines(here / "metrics.jsonl")
        assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
        assert lines[2]["loss" if where == "loss" else "grad_norm"] is None
        assert figures(events)[:2] == straight[:2]
        assert all(math.isfinite(loss) for loss, _ in figures(events)[3:])


@pytest.mark.slow
def test_a_nan_of_one_rank_ends_the_run_on_all(config_file):
    options = ["parallel.sp=2", "evaluate.sequences=0"]
    with pytest.raises(AssertionError, match=r"the loss is nan at step 3 of worker 1, in the seq"):
        run_distributed(_spoiled, 2, config_file, options, "loss")
