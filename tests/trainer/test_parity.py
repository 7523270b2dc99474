"""P ranks = one process, through the whole trainer: every mixer, ZeRO stage and topology."""

from pathlib import Path

import pytest
import torch.distributed as dist

from models.mixers import MIXERS
from tests.conftest import write_config
from tests.distributed import run_distributed
from tests.trainer.runs import Figures, figures, plain_training, train_here
from trainer import train as train_module

pytestmark = pytest.mark.slow

# Name -> what is set, and the ZeRO stages that are tried.
ATTENTION = ("model.width=24", "model.heads=12", "model.kv_heads=2", "model.window=20")
CASES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "mingru": (("model.mixer=mingru",), (0, 1, 2, 3)),
    "minlstm": (("model.mixer=minlstm",), (0, 1, 2, 3)),
    "attention": (("model.mixer=attention", *ATTENTION), (0, 1, 2, 3)),
    "attention, tied": (
        ("model.mixer=attention", "model.tie_embeddings=true", *ATTENTION),
        (0, 3),
    ),
    "window": (("model.mixer=window", *ATTENTION), (0, 3)),
    "hybrid": (("model.mixer=[mingru,window]", *ATTENTION), (0, 3)),
}
others = [mixer for mixer in MIXERS if not mixer.endswith("_loop")]  # those are gru and lstm
for mixer in others:  # whatever else there is
    CASES.setdefault(mixer, ((f"model.mixer={mixer}", *ATTENTION), (0, 3)))
# What is the same for every mixer, ZeRO, is tried with the first three at every number of ranks.
EVERY_RANKS = ("mingru", "minlstm", "attention")
ZERO_RANKS = ((2, 2), (4, 2))
# Five AdamW steps in fp32: rounding of 6e-8 a sum, amplified by divisions by small second moments.
TOLERANCE = 1e-5


def _every_stage(config_file: Path, sp: int) -> dict[str, Figures]:
    """On every rank: the figures of each case and stage, trained one after another."""
    result = {}
    for case, (settings, _) in CASES.items():
        for stage in _stages(case, dist.get_world_size(), sp):
            name = f"{case} zero={stage}"
            overrides = [
                *settings,
                f"deepspeed.zero_stage={stage}",
                f"parallel.sp={sp}",
                "evaluate.sequences=0",
                f"run.dir={config_file.parent / f'{len(result)}-{stage}-{sp}'}",
            ]
            result[name] = figures(train_here(config_file, overrides))
    return result


def _stages(case: str, ranks: int, sp: int) -> tuple[int, ...]:
    stages = CASES[case][1]
    return stages if case in EVERY_RANKS or (ranks, sp) in ZERO_RANKS else stages[:1]


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory) -> dict[str, Figures]:
    """The figures of each case, which no number of ranks changes."""
    file = write_config(tmp_path_factory.mktemp("plain"), dataset)
    return {case: plain_training(file, *settings) for case, (settings, _) in CASES.items()}


def _worst(actual: Figures, expected: Figures) -> float:
    """Largest relative difference of any loss or gradient norm."""
    assert len(actual) == len(expected) == 5
    return max(
        abs(a - e) / abs(e)
        for got, want in zip(actual, expected, strict=True)
        for a, e in zip(got, want, strict=True)
    )


@pytest.mark.parametrize(
    ("ranks", "sp"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4)], ids=lambda n: str(n)
)
def test_ranks_equal_plain_torch(config_file, expected, ranks, sp):
    """Losses and gradient norms over 5 steps, with convolution, gate, resets and clipping on."""
    results = run_distributed(_every_stage, ranks, config_file, sp)[0]
    for case in CASES:
        for stage in _stages(case, ranks, sp):
            worst = _worst(results[f"{case} zero={stage}"], expected[case])
            assert worst < TOLERANCE, f"{case} zero={stage} differs by {worst:.1e}"


def _planted(config_file: Path, stage: int) -> Figures:
    """A run whose loss forgets that the shards of one sequence are to be summed, not averaged."""
    accumulate = train_module.accumulate_gradients

    def wrong_by_sp(engine, micro_batches, worker, way):
        right, sp = type(engine).backward, worker.topology.sp_size
        engine.backward = lambda loss, last: right(engine, loss * sp, last=last)
        return accumulate(engine, micro_batches, worker, way)

    train_module.accumulate_gradients = wrong_by_sp
    overrides = [
        "parallel.sp=2",
        f"deepspeed.zero_stage={stage}",
        f"run.dir={config_file.parent / 'planted'}",
    ]
    return figures(train_here(config_file, overrides))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_factor_of_sp_is_seen(config_file, stage):
    """The comparison above fails on gradients that are sp times too large."""
    wrong = run_distributed(_planted, 2, config_file, stage, fresh=True)[0]
    assert _worst(wrong, plain_training(config_file)) > 100 * TOLERANCE
