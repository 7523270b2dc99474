"""What a step takes is foretold within a third, and segments that are chosen fit."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from launch.compare.child import Call, Child
from models.build import build_model
from models.config import ModelConfig
from models.flops import parameters
from models.mixers import MIXERS
from tests.distributed import run_distributed
from tests.trainer.runs import figures, of_kind, plain_training, train_here, warnings
from trainer import footprint as footprint_module
from trainer.checks import length_faults
from trainer.config import (
    Config,
    ConfigError,
    LaunchConfig,
    ParallelConfig,
    TrainConfig,
    load_config,
    load_dumped,
)
from trainer.events import Event, Started
from trainer.footprint import PLANNED, PROCESS, footprint, segmented

CPU = torch.device("cpu")
MODEL = ModelConfig(layers=3, width=72, heads=6, window=33, attention_conv=3)


def _config(mixer: object, seq_len: int = 1 << 17, sp: int = 1, **train: object) -> Config:
    return Config(
        model=replace(MODEL, mixer=mixer),
        train=TrainConfig(seq_len=seq_len, segment_len="auto", **train),
        parallel=ParallelConfig(sp=sp),
        launch=LaunchConfig(workers=sp),
    )


@pytest.mark.parametrize("mixer", [*MIXERS, ["mingru", "window", "attention"]], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_backward_needs_is_what_the_whole_model_keeps(mixer, dtype):
    config = _config(mixer, dtype=dtype)
    model = build_model(config.model).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    counted = []
    for steps in (1024, 3072):
        kept.clear()
        with saved_tensors_hooks(note, lambda x: x):
            tokens = torch.zeros(1, steps, dtype=torch.int64)
            result = model(tokens, readout=lambda hidden, weight: hidden)
        counted.append(sum(kept.values()))
        del result
    assert footprint(config, CPU).token * 2048 == pytest.approx(counted[1] - counted[0], rel=0.1)


GIB = 1 << 30


@pytest.mark.parametrize("mixer", ["mingru", "s4d", "window", "attention"])
def test_what_is_chosen_fits_whatever_there_is(mixer):
    """For no memory are segments larger than what there is; more memory never means more reads."""
    for sp, length, batch in product((1, 2, 3), (40, 1 << 16, 3_000_000), (1, 4)):
        reads = []
        config = _config(mixer, length * sp, sp, micro_batch_size=batch, batch_size=batch)
        found = footprint(config, CPU)
        for memory in (1.0, 1.7, 2.5, 4.0, 16.0, 64.0, 4096.0):
            try:
                chosen = segmented(config, found, round(memory * GIB))
            except ValueError:
                continue  # nothing fits
            assert found.of_step(chosen) <= PLANNED * memory * GIB
            assert not list(length_faults(chosen))
            reads.append(len(chosen.plan.reads) / chosen.plan.segments)
        assert reads == sorted(reads, reverse=True)
        assert reads[-1] == 1
        assert chosen.train.segment_len is None


def test_little_memory_means_short_segments_and_some_are_kept():
    config = _config("mingru", 1 << 20)
    found = footprint(config, CPU)
    memories = [round((PROCESS + GIB / n) / PLANNED) for n in (1, 2, 4, 8)]
    lengths = [segmented(config, found, memory).train.segment_len for memory in memories]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < footprint_module.FASTEST
    plenty = segmented(config, found, 20 * GIB).train
    assert plenty.segment_len == footprint_module.FASTEST
    assert 1 < plenty.keep_segments < 32


@pytest.mark.parametrize(
    ("mixer", "stage"), [("attention", 0), (["mingru", "attention"], 0), ("mingru", 3)], ids=str
)
def test_one_is_kept_where_more_are_not_sound(mixer, stage):
    config = _config(mixer, 1 << 20)
    config.deepspeed.zero_stage = stage
    chosen = segmented(config, footprint(config, CPU), 30 * GIB).train
    assert chosen.segment_len is not None
    assert chosen.keep_segments == 1


def test_a_length_that_is_set_stays():
    config = _config("mingru")
    config.train.segment_len = 4096
    assert segmented(config, footprint(config, CPU), GIB) is config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "seq_len", "segment_len"),
    [
        ("mingru", 1 << 15, None),
        ("mamba", 1 << 15, None),
        ("window", 1 << 15, 1 << 13),
        ("attention", 1 << 13, 1 << 11),
    ],
)
def test_memory_is_as_foretold(mixer, seq_len, segment_len):
    """Of a process that takes a step."""
    config = _config(mixer, seq_len)
    config.train.segment_len = segment_len
    call = Call("trainer.measure:measure_training", config, (1, 0.0), 300.0)
    cost = Child(call, {"OMP_NUM_THREADS": "1"}).wait()
    step = footprint(config, CPU).of_step(config) - PROCESS
    base = 300e6  # of torch and DeepSpeed, which load more of themselves when a model is there
    assert 0.67 * step < cost.peak_memory_bytes < 1.33 * step + base
    assert cost.idle_memory_bytes + base == pytest.approx(PROCESS, rel=0.25)


def _with_memory(config_file: Path, overrides: list[str], tokens: int) -> list[Event]:
    """A run on workers whose memory is what a step in segments of so many tokens takes."""
    config = load_config(config_file, overrides)
    cut = replace(config, train=replace(config.train, segment_len=tokens, keep_segments=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint_module, "PROCESS", 0)
        patch.setattr(footprint_module, "LEAST", 8)
        patch.setattr(footprint_module, "FASTEST", 64)
        bytes_there = round(footprint(config, CPU).of_step(cut) / PLANNED) + 1
        patch.setattr(footprint_module, "memory_of", lambda worker: bytes_there)
        return train_here(config_file, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("sp", [1, 2])
def test_a_run_streams_where_its_sequences_do_not_fit(config_file, sp):
    """The losses are those of whole sequences; what was chosen is in the run's configuration."""
    options = ["train.segment_len=auto", f"parallel.sp={sp}", f"launch.workers={sp}"]
    events = run_distributed(_with_memory, sp, config_file, options, 48)[0]
    assert of_kind(events, Started)[0].segments == 6
    for got, want in zip(figures(events), plain_training(config_file), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert load_dumped(config_file.parent / "run" / "config.yaml").train.segment_len == 32


@pytest.mark.slow
def test_a_step_that_may_not_fit_is_told(config_file):
    events = run_distributed(_with_memory, 1, config_file, [], 16)[0]
    assert "a step is expected to take" in warnings(events)[0]
    assert "set train.segment_len=auto" in warnings(events)[0]
    assert not warnings(run_distributed(_with_memory, 1, config_file, [], 192)[0])


def test_shards_of_every_length_are_longer_than_a_window():
    """Of an evaluation at another length too, whose last segment may be a short one."""
    config = _config("window", 1 << 19, 2)
    config.evaluate.seq_len, config.model.window = 66_000, 257
    found = footprint(config, CPU)
    for gib in (3, 4, 8):
        chosen = segmented(config, found, gib * GIB)
        assert chosen.train.segment_len
        assert not list(length_faults(chosen.held_out))


def test_weights_are_shared_out_by_the_stage():
    """bf16, 16 bytes a number at stage 0; at 3 a worker has its part of all."""
    config = _config("mingru", dtype="bf16")
    config.launch.workers = 64
    bytes_of = []
    for config.deepspeed.zero_stage in range(4):
        bytes_of.append(footprint(config, CPU).weights / parameters(config.model))
    assert bytes_of == pytest.approx([18, 6 + 12 / 64, 2 + 16 / 64, 18 / 64], rel=1e-3)


def test_a_truncated_step_holds_one_carry():
    config = _config("mamba", 1 << 20)
    config.train.segment_len = 512
    found = footprint(config, CPU)
    exact = found.of_step(config)
    config.train.truncate = True
    assert exact - found.of_step(config) == pytest.approx(4094 * found.carry, rel=1e-3)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("often", "'often' is neither a number nor auto"),
        ("0", "0 is not positive"),
        ("1.5", "must be a whole decimal number"),
    ],
)
def test_a_length_that_is_none_is_told(config_file, value, told):
    with pytest.raises(ConfigError, match=told):
        load_config(config_file, [f"train.segment_len={value}"])


def test_auto_is_refused_where_segments_decide_what_is_learned(config_file):
    with pytest.raises(ConfigError, match="auto goes by memory"):
        load_config(config_file, ["train.segment_len=auto", "train.truncate=true"])


def test_auto_is_a_value_in_the_file_and_on_the_command_line(config_file):
    assert load_config(config_file, ["train.segment_len=auto"]).train.segment_len == "auto"
    config_file.write_text(config_file.read_text().replace("{steps: 5", "{segment_len: auto"))
    assert load_config(config_file, []).train.segment_len == "auto"
    assert load_config(config_file, ["train.segment_len=48"]).train.segment_len == 48
    assert load_config(config_file, ["train.segment_len=null"]).train.segment_len is None
