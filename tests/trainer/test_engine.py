"""The door to DeepSpeed: what it is told, and backwards that are not micro-batches."""

import pytest
import torch
from torch import nn

from tests.distributed import run_distributed
from trainer.config import Config, load_config
from trainer.deepspeed_settings import deepspeed_config
from trainer.engine import Engine
from trainer.worker import Worker


def _told(config_file, *overrides: str) -> dict:
    return deepspeed_config(load_config(config_file, list(overrides)))


def test_settings_that_differ_from_deepspeeds_defaults(config_file):
    """Each closes a trap."""
    plain = _told(config_file, "launch.workers=2", "parallel.sp=2")
    assert plain["gradient_clipping"] == 0.5
    assert plain["train_batch_size"] == 2  # sequences, counted over dp alone
    assert plain["gradient_accumulation_steps"] == 2
    assert plain["zero_optimization"]["reduce_bucket_size"] < 1e6  # no 2 GB for a small model
    assert "bf16" not in plain
    third = _told(config_file, "deepspeed.zero_stage=3")["zero_optimization"]
    assert third["reduce_scatter"] is False
    assert third["memory_efficient_linear"] is False
    second = _told(config_file, "deepspeed.zero_stage=2", "train.dtype=bf16")
    assert second["bf16"] == {"enabled": True}
    assert second["communication_data_type"] == "fp32"
    assert _told(config_file, "train.dtype=bf16")["communication_data_type"] == "fp32"
    first = _told(config_file, "deepspeed.zero_stage=1", "train.dtype=bf16")
    assert "communication_data_type" not in first


class _Product(nn.Module):
    """y = x w, whose gradient is easily told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _norms(config: Config) -> list[float]:
    """On every rank: the gradient's norm of steps with three backwards and with one."""
    worker = Worker.join(config)
    engine = Engine(_Product(), worker)
    norms = []
    for parts in ((1.0, 2.0, 4.0), (7.0,)):
        for number, part in enumerate(parts, start=1):
            x = torch.full((1, 3), part * (worker.topology.rank + 1))
            engine.backward(engine(x).sum(), last=number == len(parts))
        norms.append(engine.step(learning_rate=0.0))
    engine.destroy()
    worker.topology.destroy()
    return norms


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_has_as_many_backwards_as_it_likes(config_file, stage):
    """Whatever DeepSpeed's accumulation is set to; summed over the ranks of a sequence."""
    options = ["parallel.sp=2", f"deepspeed.zero_stage={stage}", "train.batch_size=2"]
    config = load_config(config_file, options, workers=2)
    expected = 7 * (1 + 2) * 3**0.5  # three weights, ranks with x and 2 x
    for norms in run_distributed(_norms, 2, config):
        assert norms == pytest.approx([expected, expected], rel=1e-6)
