"""The table of mixers; a mixer of one's own; and every part ready for use when it is made alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.block import Block
from models.config import ModelConfig
from models.flops import mixing_flops_per_token, parameters
from models.layers import CausalConv, SwiGLU
from models.lm import LanguageModel
from models.mixer import build_mixer
from models.mixers import MIXERS
from models.mixers.mingru import MinGRUMixer
from tests.distributed import run_distributed
from tests.models.own_mixer import ENTRY
from tests.trainer.runs import figures, plain_training, train_here

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(layers=2, width=16, vocab_size=50, window=9)


def _train_own(config_file: Path, stage: int) -> list[tuple[float, float]]:
    MIXERS["average"] = ENTRY
    stages = [f"deepspeed.zero_stage={stage}", f"run.dir={config_file.parent / str(stage)}"]
    options = ["model.mixer=average", "parallel.sp=2", "train.steps=3"]
    return figures(train_here(config_file, [*options, *stages]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_mixer_is_its_file_and_a_line(config_file, stage, monkeypatch):
    """Checked, counted, sharded, trained and generated from, by its file and its line alone."""
    monkeypatch.setitem(MIXERS, "average", ENTRY)
    trained = run_distributed(_train_own, 2, config_file, stage)[0]
    expected = plain_training(config_file, "model.mixer=average", "train.steps=3")
    assert len(trained) == 3
    for got, want in zip(trained, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    config = ModelConfig(mixer=["average", "mingru"], layers=2, width=16, vocab_size=50)
    assert not config.faults()
    model = LanguageModel(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    assert mixing_flops_per_token(config, 64) == 3 * 16 + 12 * 16 + 2 * 4 * 16
    tokens = torch.randint(50, (2, 20))
    whole, _ = model(tokens)
    first, carry = model(tokens[:, :7])
    second, _ = model(tokens[:, 7:], carry)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_made_alone_is_ready_for_use(name):
    """In somebody's own network: no value is left to whatever memory held (which is NaN here)."""
    mixer = build_mixer(name, SMALL)
    assert all(p.isfinite().all() for p in mixer.parameters())
    y, _ = mixer(torch.randn(2, 20, 16))
    assert y.isfinite().all()
    assert y.std() > 0.01


@pytest.mark.parametrize("name", MIXERS)
def test_a_block_made_alone_is_ready_for_use(name):
    block = Block(SMALL, name)
    x = torch.randn(2, 20, 16)
    y, _ = block(x)
    assert y.isfinite().all()
    assert not torch.equal(x, y)


def test_layers_made_alone_are_ready_for_use():
    torch.manual_seed(0)
    conv, mlp = CausalConv(512, 4), SwiGLU(256, 512, residual_scale=0.5)
    # the identity plus noise
    torch.testing.assert_close(conv.weight.mean(1), torch.tensor([1.0, 0, 0, 0]), atol=0.02, rtol=0)
    assert conv.weight.std(1).tolist() == pytest.approx([0.1] * 4, rel=0.15)
    assert not conv.bias.any()
    # variances of one over the fan-in; what writes to the residual is scaled
    assert mlp.gate_and_in.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert mlp.out.weight.std().item() == pytest.approx(0.5 * 512**-0.5, rel=0.02)


def test_reset_parameters_draws_the_same_values_again():
    torch.manual_seed(3)
    mixer = MinGRUMixer(SMALL)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    torch.manual_seed(3)
    for module in mixer.modules():
        if hasattr(module, "reset_parameters"):
            with torch.no_grad():
                for p in module.parameters(recurse=False):
                    p.fill_(float("nan"))
    for module in [*mixer.children(), mixer]:
        module.reset_parameters()
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_the_table_needs_no_torch():
    """A configuration is checked in an instant."""
    script = "import sys, models.config, trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_a_scan_needs_torch_alone():
    """No other package that the project depends on is imported."""
    script = (
        "import sys\n"
        "from models.scan import mingru_scan\n"
        "import torch\n"
        "mingru_scan(torch.randn(1, 5, 8))\n"
        "others = 'deepspeed ray streaming omegaconf tensorboard tokenizers matplotlib'\n"
        "print([name for name in others.split() if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
