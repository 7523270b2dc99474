"""The mamba mixer against transformers' MambaModel: the same weights give the same logits."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from models.config import ModelConfig
from models.flops import parameters, training_flops_per_token
from models.lm import LanguageModel


def mamba_of(config: ModelConfig) -> MambaForCausalLM:
    """transformers' model of the same shape."""
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            state_size=config.state_size or 16,
            num_hidden_layers=config.layers,
            layer_norm_epsilon=config.norm_eps,
            expand=int(config.expansion),
            conv_kernel=config.conv_width,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


@torch.no_grad()
def copy_weights(mamba: MambaForCausalLM, model: LanguageModel) -> None:
    """Give `model` the weights of `mamba`."""
    model.embed.weight.copy_(mamba.backbone.embeddings.weight)
    model.norm.weight.copy_(mamba.backbone.norm_f.weight)
    model.head.weight.copy_(mamba.lm_head.weight)
    for ours, theirs in zip(model.blocks, mamba.backbone.layers, strict=True):
        mixer, block = ours.mixer, theirs.mixer
        for target, source in (
            (ours.mixer_norm.weight, theirs.norm.weight),
            (mixer.into.weight, block.in_proj.weight),
            (mixer.conv.weight, block.conv1d.weight[:, 0].flip(-1).T),
            (mixer.conv.bias, block.conv1d.bias),
            (mixer.select.weight, block.x_proj.weight),
            (mixer.step.weight, block.dt_proj.weight),
            (mixer.step_bias, block.dt_proj.bias),
            (mixer.log_rate, block.A_log),
            (mixer.skip, block.D),
            (mixer.out.weight, block.out_proj.weight),
        ):
            target.copy_(source)


def test_its_gate_and_convolution_stay_where_other_recurrences_have_none():
    """Or a comparison at `gate: false` would not be with Mamba."""
    published = ModelConfig(mixer="mamba", layers=1, width=32)
    bare = ModelConfig(mixer="mamba", layers=1, width=32, gate=False, conv_width=0)
    with torch.device("meta"):
        shapes = [
            [(name, tuple(p.shape)) for name, p in LanguageModel(config).named_parameters()]
            for config in (published, bare)
        ]
    assert shapes[0] == shapes[1]
    assert published.halo_width == bare.halo_width == 3
    for figures in (parameters, lambda config: training_flops_per_token(config, 64)):
        assert figures(published) == figures(bare)


@pytest.mark.parametrize("changes", [{}, {"state_size": 5, "tie_embeddings": True}], ids=str)
def test_same_weights_give_the_logits_of_mamba(changes):
    torch.manual_seed(0)
    config = ModelConfig(
        mixer="mamba", layers=3, width=32, vocab_size=60, expansion=2.0, mlp_ratio=0.0, **changes
    )
    model, mamba = LanguageModel(config), mamba_of(config)
    copy_weights(mamba, model)
    assert parameters(config) == sum(p.numel() for p in mamba.parameters())
    tokens = torch.randint(60, (2, 100))
    torch.testing.assert_close(
        model(tokens, last=True)[0], mamba(tokens).logits, rtol=1e-4, atol=1e-5
    )
