"""Several lengths in one run: each step is as in a run of its length; a resume knows which."""

from pathlib import Path

import pytest
import torch

from models.build import build_model
from tests.trainer.runs import Figures, figures, of_kind, plain_step, run, started_at, warnings
from trainer.config import ConfigError, load_config
from trainer.data import SequenceReader, TokenStream
from trainer.events import Stepped
from trainer.layout import Layout
from trainer.optim import build_optimizer

# of five steps two on each of two lengths, then one on 192 tokens
CURRICULUM = ["train.curriculum=[48,96]", "train.curriculum_steps=2", "evaluate.sequences=2"]


def _plain(file: Path, options: list[str]) -> Figures:
    """The same in plain torch: at each length the sequences begin anew, 384 tokens a step."""
    config = load_config(file, options)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim, config.model.memory_tokens)
    result = []
    for step, length in enumerate([48, 48, 96, 96, 192]):
        reader = SequenceReader(TokenStream(config.data, "train"), Layout(length), True)
        order, count, first = reader.order(config.run.seed, shift=False), 384 // length, step % 2
        batch = reader.micro_batch([order[first * count + i] for i in range(count)])
        result.append(plain_step(model, optimizer, batch, config, step))
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, []),
        (2, ["parallel.sp=2", "train.segment_len=64", "deepspeed.zero_stage=2"]),
        (2, ["deepspeed.zero_stage=3"]),
    ],
    ids=str,
)
def test_each_step_is_that_of_its_length(config_file, ranks, options):
    expected = _plain(config_file, CURRICULUM)
    events = run(config_file, ranks, *CURRICULUM, *options)
    for got, want in zip(figures(events), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    lines = [step.metrics for step in of_kind(events, Stepped)]
    assert [line["seq_len"] for line in lines] == [48, 48, 96, 96, 192]
    assert [line["tokens"] for line in lines] == [384 * step for step in range(1, 6)]


@pytest.mark.slow
def test_a_resume_goes_on_at_the_length_where_it_stood(config_file):
    """In the middle of a length, and on its edge, to the bit."""
    whole = figures(run(config_file, 1, *CURRICULUM))
    parts: Figures = []
    folder = f"run.dir={config_file.parent / 'parts'}"
    for step, count in ((0, 1), (1, 1), (2, 3)):
        events = run(config_file, 1, *CURRICULUM, folder, f"train.stop_after={count}")
        assert started_at(events) == step
        parts += figures(events)
    assert parts == whole


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["train.curriculum=[50]"], "50 does not divide train.seq_len 192"),
        (["train.curriculum=[0]"], "0 is not positive"),
        (
            ["train.curriculum=[3]", "parallel.sp=2", "launch.workers=2"],
            "3 is not divisible by parallel.sp 2",
        ),
        (
            ["train.curriculum=[4]", "parallel.sp=2", "launch.workers=2"],
            "gives shards of 2 tokens, fewer than the 3",
        ),
    ],
)
def test_a_length_that_does_not_fit_is_told(config_file, options, told):
    with pytest.raises(ConfigError, match=f"train.curriculum: .*{told}"):
        load_config(config_file, options)


def test_a_step_has_as_many_tokens_at_every_length(config_file):
    config = load_config(config_file, CURRICULUM)
    stages = [config.at(step).train for step in range(5)]
    assert [stage.seq_len for stage in stages] == [48, 48, 96, 96, 192]
    assert {stage.seq_len * stage.batch_size for stage in stages} == {384}
    assert {config.at(step).accumulation for step in range(5)} == {2}
    assert config.at(4) == config
    twice = load_config(config_file, ["train.curriculum=[96,96]", "train.curriculum_steps=2"])
    assert [twice.stage(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.slow
def test_a_curriculum_that_fills_the_run_is_told(config_file):
    events = run(config_file, 1, "train.curriculum=[48]", "train.steps=2", "evaluate.sequences=0")
    assert warnings(events) == [
        "train.curriculum lasts all of train.steps: no step has train.seq_len tokens"
    ]


def test_as_many_sequences_go_at_once_as_a_segment_has_room_for(config_file):
    """Streamed for want of memory, the short ones of its beginning take no more of it."""
    options = ["train.curriculum=[16,48]", "train.curriculum_steps=1", "train.segment_len=64"]
    config = load_config(config_file, options)
    sizes = [config.at(step).train for step in range(3)]
    assert [(size.seq_len, size.micro_batch_size) for size in sizes] == [(16, 4), (48, 1), (192, 1)]
    assert [size.segment_len for size in sizes] == [16, 48, 64]
    assert [config.at(step).accumulation for step in range(3)] == [6, 8, 2]
