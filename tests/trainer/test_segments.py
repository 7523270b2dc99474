"""A streamed sequence has the gradient of the whole, however it is cut; faults are seen."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launch.compare.child import Call, Child
from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixers import MIXERS
from tests.conftest import write_config
from tests.distributed import run_distributed
from tests.trainer.runs import Figures, figures, plain_training, run, train_here
from trainer import segments as segments_module
from trainer import step as step_module
from trainer.config import Config, ConfigError, LaunchConfig, TrainConfig, load_config
from trainer.data import MicroBatch
from trainer.layout import Layout, Plan
from trainer.measure import measure_training
from trainer.memory import peak_memory_bytes
from trainer.segments import Shelf, stream

TOKENS = 53
SHARDED = ["parallel.sp=2", "launch.workers=2"]
SMALL = ModelConfig(
    layers=2, width=16, heads=2, vocab_size=11, window=9, memory_tokens=16, attention_conv=3
)
MIXED: list[Any] = [*MIXERS, ["mingru", "attention"], ["lstm", "window"]]


def _model(mixer: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(SMALL, mixer=mixer)).double()


def _sequence(segment_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and resets, where two rows begin documents on a segment's edges too."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (2, TOKENS + 1), generator=generator)
    reset = torch.zeros(2, TOKENS, dtype=torch.uint8)
    reset[0, segment_len % TOKENS] = reset[1, 5] = reset[1, TOKENS - 2] = 1
    return tokens[:, :-1], tokens[:, 1:], reset


def _whole(mixer: Any, segment_len: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = _model(mixer)
    tokens, labels, reset = _sequence(segment_len)
    logits, _ = model(tokens, reset=reset)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def _streamed(
    mixer: Any, segment_len: int, keep: int = 1, truncate: bool = False, late: int = 0
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by segments; `late` moves resets on their edges."""
    model = _model(mixer)
    tokens, labels, reset = _sequence(segment_len)
    layout = Layout(TOKENS, segment_len=segment_len)
    plan = Plan(layout.segments, min(keep, layout.segments), truncate)
    if late:
        reset = reset.roll(late, dims=1)

    reads = (layout.held(number) for number in plan.reads)
    batches = (
        MicroBatch(*(x[:, r.start : r.stop] for x in (tokens, labels, reset))) for r in reads
    )
    work = _Work(model, batches, layout.segments)
    loss = stream(plan, work)
    assert work.done == [False] * (layout.segments - 1) + [True]
    assert next(batches, None) is None
    return float(loss), {name: p.grad for name, p in model.named_parameters()}


@dataclass
class _Work:
    model: LanguageModel
    batches: Iterator[MicroBatch]
    segments: int
    done: list[bool] = field(default_factory=list)

    def take(self, here):
        return next(self.batches)

    def run(self, segment, batch, carry, answer):
        last = segment == self.segments - 1
        logits, leaving = self.model(batch.inputs, carry, reset=batch.reset, last=last)
        if not answer:
            return logits.sum(), leaving
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        return losses / (2 * TOKENS), leaving

    def backward(self, loss, done):
        self.done.append(done)
        loss.backward()


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("mixer", ["mingru", "gru", "mamba", "window"])
def test_a_carry_keeps_its_own_bytes_and_no_segment(mixer, truncate):
    """A state cut from a segment's activations would keep all of them, for every segment."""
    model = _model(mixer)
    tokens = torch.zeros(1, 40 * 7, dtype=torch.int64)
    plan, held = Plan(7, truncate=truncate), []

    class Watched(_Work):
        def take(self, here):
            carries = [x for each in here.entering for layer in each or [] for x in layer]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in carries}
            if truncate:
                most = 2 * sum(x.nbytes for x in carries)
                assert sum(x.nbytes() for x in storages.values()) <= most
            else:  # all side by side
                assert [x.nbytes() for x in storages.values()] in ([], [Shelf.SLABS[0]])
            assert len({x.untyped_storage().data_ptr() for x in here.losses}) <= 1
            held.append(len(here.entering))
            return super().take(here)

    cut = (tokens[:, read * 40 : read * 40 + 40] for read in plan.reads)
    stream(plan, Watched(model, (MicroBatch(x, x, None) for x in cut), 7))
    assert max(held) == (1 if truncate else 7)


def _resident(config: Config) -> list[int]:
    """The most bytes of this process so far, at each segment of a step on the way there."""
    found: list[int] = []

    class Watched(step_module._Work):
        def take(self, here):
            found.append(peak_memory_bytes(torch.device("cpu")))
            return super().take(here)

    step_module._Work = Watched  # this process is a test's own, and ends
    measure_training(config, 1, 0.0, untimed=0)
    return found[: config.plan.segments]


@pytest.mark.slow
def test_memory_is_a_segment_and_its_carries():
    """Where each carry lies where there is room for it, it grows by 130 MB in these segments."""
    model = ModelConfig(mixer="mingru", layers=2, width=64)
    train = TrainConfig(seq_len=64 * 4096, segment_len=4096)
    config = Config(model=model, train=train, launch=LaunchConfig(workers=1))
    call = Call(f"{__name__}:_resident", config)
    resident = Child(call, {"OMP_NUM_THREADS": "1"}).wait()
    assert resident[-1] - resident[8] < 30e6


def _difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest, of any number of any gradient, over the largest of that gradient."""
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max()) for n in other)


@pytest.mark.parametrize("segment_len", [27, 20, 7, 1])
@pytest.mark.parametrize("mixer", MIXED, ids=str)
def test_the_gradient_is_that_of_the_whole(mixer, segment_len):
    """Of every parameter, in fp64, with a shorter last segment and resets on edges."""
    loss, expected = _whole(mixer, segment_len)
    for keep in (1, 2) if segment_len == 20 else (1,):
        streamed, gradients = _streamed(mixer, segment_len, keep)
        assert streamed == pytest.approx(loss, rel=1e-12)
        assert _difference(gradients, expected) < 1e-9


@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_a_truncated_gradient_is_another(mixer):
    """The carry passes, so the loss is that of the whole; the gradient stops at segments."""
    loss, expected = _whole(mixer, 20)
    truncated, gradients = _streamed(mixer, 20, truncate=True)
    assert truncated == pytest.approx(loss, rel=1e-12)
    assert _difference(gradients, expected) > 1e-3
    model = _model(mixer)
    tokens, labels, reset = _sequence(20)
    carry = None
    for begin in range(0, TOKENS, 20):
        here = slice(begin, begin + 20)
        logits, carry = model(tokens[:, here], carry, reset=reset[:, here])
        total = F.cross_entropy(logits.flatten(0, 1), labels[:, here].flatten(), reduction="sum")
        (total / labels.numel()).backward()
        carry = [tuple(x.detach() for x in layer) for layer in carry]
    cut = {name: p.grad for name, p in model.named_parameters()}
    assert _difference(gradients, cut) < 1e-9


def _lost(x):
    """The carry's gradient."""
    return None


def _twice(x):
    return None if x.grad is None else 2 * x.grad


def _halo_lost(x):
    """Of states [B, H] alone something comes back."""
    return x.grad if x.dim() == 2 else None


@pytest.mark.parametrize("fault", [_lost, _twice, _halo_lost])
@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "gru", "s4d", "mamba", "window"])
def test_a_wrong_flow_is_seen(monkeypatch, mixer, fault):
    """What the comparison above is worth: with a fault planted it fails."""
    _, expected = _whole(mixer, 20)
    monkeypatch.setattr(segments_module, "_gradient", fault)
    assert _difference(_streamed(mixer, 20)[1], expected) > 1e-4


@pytest.mark.parametrize("mixer", ["mingru", "attention"])
def test_another_segment_or_a_late_reset_is_seen(monkeypatch, mixer):
    _, expected = _whole(mixer, 20)
    assert _difference(_streamed(mixer, 20, late=1)[1], expected) > 1e-4
    monkeypatch.setattr(Plan, "reads", [0, 1, 2, 0, 1])  # back, one too early
    assert _difference(_streamed(mixer, 20)[1], expected) > 1e-4


HYBRID = ("model.mixer=[mingru,window]", "model.window=10")
ATTENTION = ("model.mixer=[attention,minlstm]", "model.width=24", "model.heads=12")
CUT = "train.segment_len=78"  # of 192 tokens: the last has 36
SHORT = ("train.steps=3",)
KEPT_AND_RECOMPUTED = ("train.keep_segments=9", "train.recompute=true")
# name -> what makes the model, and how it is streamed
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{f"zero {n}": (HYBRID, (CUT, f"deepspeed.zero_stage={n}")) for n in range(4)},
    "short": (HYBRID, ("train.segment_len=48", "train.keep_segments=2")),
    "kept at zero 1": (HYBRID, (CUT, "train.keep_segments=9", "deepspeed.zero_stage=1")),
    "kept at zero 2": (HYBRID, (CUT, "train.keep_segments=2", "deepspeed.zero_stage=2")),
    "recomputed": (HYBRID, (CUT, "train.recompute=true", "deepspeed.zero_stage=3")),
    "attention": (ATTENTION, (CUT,)),
    "kept and recomputed": (
        (*ATTENTION, "model.layers=4"),
        ("train.segment_len=30", *KEPT_AND_RECOMPUTED),
    ),
    "gru": (("model.mixer=gru",), (CUT,)),
    "mamba": (("model.mixer=mamba",), (CUT, "deepspeed.zero_stage=2")),
    "s4d": (("model.mixer=s4d",), (CUT,)),
}


# Ranks, and how many share a sequence: the cases that are tried there.
WORLDS = {
    (1, 1): list(CASES),
    (3, 3): ["zero 3", "short", "attention", "gru", "mamba"],
    (4, 2): ["zero 0", "zero 1", "kept at zero 2", "recomputed", "s4d"],
}


def _cases(config_file: Path, sp: int, names: list[str]) -> dict[str, Figures]:
    """On every rank: those cases, trained one after another."""
    result = {}
    for name in names:
        model, how = CASES[name]
        folder = f"run.dir={config_file.parent / name.replace(' ', '-')}"
        overrides = [*model, *how, *SHORT, f"parallel.sp={sp}", "evaluate.sequences=0", folder]
        result[name] = figures(train_here(config_file, overrides))
    return result


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory) -> dict[str, Figures]:
    """The figures of each case on whole sequences, in plain torch."""
    file = write_config(tmp_path_factory.mktemp("plain"), dataset)
    models = {model for model, _ in CASES.values()}
    found = {model: plain_training(file, *model, *SHORT) for model in models}
    return {name: found[model] for name, (model, _) in CASES.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sp"), [*WORLDS], ids=str)
def test_a_streamed_run_equals_plain_torch(config_file, plain, ranks, sp):
    """Losses and gradient norms over 3 steps, with micro-batches, clipping and resets."""
    names = WORLDS[ranks, sp]
    streamed = run_distributed(_cases, ranks, config_file, sp, names)[0]
    for name in names:
        assert len(streamed[name]) == len(plain[name]) == 3
        for got, want in zip(streamed[name], plain[name], strict=True):
            assert got == pytest.approx(want, rel=1e-5), name


@pytest.mark.slow
def test_masks_of_dropout_are_those_of_the_way_there(config_file):
    """Run once or twice, a segment drops the same; other segments drop others."""
    options = [CUT, "model.dropout=0.3", "evaluate.sequences=0"]
    found = []
    for keep in (1, 2, 3):
        folder = f"run.dir={config_file.parent / str(keep)}"
        found.append(figures(run(config_file, 1, *options, f"train.keep_segments={keep}", folder)))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_a_streamed_evaluation_is_the_whole_one(config_file):
    """Held-out loss, by position too, over segments and shards."""
    found = []
    for name, ranks, options in (
        ("whole", 1, []),
        ("cut", 1, [CUT]),
        ("shards", 2, [CUT, "parallel.sp=2"]),
        ("longer", 1, ["train.segment_len=64", "evaluate.seq_len=192"]),
    ):
        folder = config_file.parent / name
        still = ["train.steps=1", "optim.learning_rate=1e-9", f"run.dir={folder}"]
        run(config_file, ranks, *HYBRID, *options, *still)
        found.append(json.loads((folder / "evaluation.json").read_text()))
    for result in found[1:]:
        assert result["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
        assert result["tokens"] == found[0]["tokens"]
        for got, want in zip(result["by_position"], found[0]["by_position"], strict=True):
            assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["train.segment_len=200"], "200 is above train.seq_len 192"),
        (["train.segment_len=77", *SHARDED], "77 is not divisible by parallel.sp 2: use 76"),
        (["train.segment_len=95", "launch.workers=1"], None),
        (["train.segment_len=188", *SHARDED], "gives shards of 2 tokens, fewer than the 3"),
        (["train.segment_len=0"], "train.segment_len"),
        (["train.keep_segments=2", "deepspeed.zero_stage=3"], "2 loses gradients at ZeRO stage 3"),
    ],
)
def test_a_cut_that_does_not_fit_is_told(config_file, options, told):
    if told is None:
        assert load_config(config_file, options).layout().segments == 3
        return
    with pytest.raises(ConfigError, match=told):
        load_config(config_file, options)
