"""The Transformer baseline against transformers' Llama: the same weights give the same logits."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.config import ModelConfig
from models.flops import parameters
from models.lm import LanguageModel


def llama_of(config: ModelConfig) -> LlamaForCausalLM:
    """transformers' model of the same shape."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.shared_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=1 << 20,
            attn_implementation="sdpa",
        )
    )


@torch.no_grad()
def copy_weights(model: LanguageModel, llama: LlamaForCausalLM) -> None:
    """Give `llama` the weights of `model`."""
    llama.model.embed_tokens.weight.copy_(model.embed.weight)
    llama.model.norm.weight.copy_(model.norm.weight)
    llama.lm_head.weight.copy_(model.head.weight)
    for ours, theirs in zip(model.blocks, llama.model.layers, strict=True):
        mixer, attention = ours.mixer, theirs.self_attn
        kv = mixer.kv_heads * mixer.head_width
        q, k, v = mixer.qkv.weight.split([model.config.width, kv, kv])
        for target, source in (
            (attention.q_proj, q),
            (attention.k_proj, k),
            (attention.v_proj, v),
            (attention.o_proj, mixer.out.weight),
            (theirs.mlp.gate_proj, ours.mlp.gate_and_in.weight.chunk(2)[0]),
            (theirs.mlp.up_proj, ours.mlp.gate_and_in.weight.chunk(2)[1]),
            (theirs.mlp.down_proj, ours.mlp.out.weight),
            (theirs.input_layernorm, ours.mixer_norm.weight),
            (theirs.post_attention_layernorm, ours.mlp_norm.weight),
        ):
            target.weight.copy_(getattr(source, "data", source))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2, "rope_base": 500_000.0}, {"kv_heads": 1, "tie_embeddings": True}],
    ids=str,
)
def test_same_weights_give_the_logits_of_llama(changes):
    config = ModelConfig(mixer="attention", layers=3, width=32, vocab_size=60, heads=4, **changes)
    model, llama = LanguageModel(config).double(), llama_of(config).double()
    copy_weights(model, llama)
    assert parameters(config) == sum(p.numel() for p in llama.parameters())
    tokens = torch.randint(60, (2, 100))
    torch.testing.assert_close(
        model(tokens, last=True)[0], llama(tokens).logits, rtol=1e-5, atol=1e-6
    )
