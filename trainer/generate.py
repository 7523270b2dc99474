"""Continue a text: with constant memory and time per token, unless a layer is full attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor

from data_prep.tokenizer import Tokenizer, folder_tokenizer
from models.lm import LanguageModel
from models.mixer import Carry
from trainer.checkpoint import find_weights
from trainer.config import load_dumped
from trainer.run_folder import RunFolder


def load_run(folder: Path, device: torch.device) -> tuple[LanguageModel, Tokenizer, int]:
    """Model and tokenizer of a run's folder, and the step its weights are of.

    Raises ValueError where the folder holds no run or no intact checkpoint.
    """
    run = RunFolder(folder)
    config = load_dumped(run.config)
    weights, manifest = find_weights(run)
    model = LanguageModel(config.model)
    load_model(model, weights)  # knows of a matrix that embedding and head share
    return model.to(device).float().eval(), folder_tokenizer(folder), manifest.step


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the likeliest, top_k > 0 one of the k likeliest."""

    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token, from logits [V]."""
        if self.temperature <= 0:
            return logits.argmax()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.numel():
            least = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[0]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: list[int],
    max_tokens: int,
    sampling: Sampling,
    segment_tokens: int = 4096,
) -> Iterator[int]:
    """Tokens that continue `prompt`, one by one.

    The prompt, of any length, is read in segments of `segment_tokens`; what is kept between
    segments and between tokens is the model's carry, whose size does not grow but for full
    attention's, which holds keys and values of all that was read.
    Raises ValueError for an empty prompt or a token outside the vocabulary.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    if max(prompt) >= model.config.vocab_size:
        raise ValueError(f"the prompt has token {max(prompt)}, beyond the model's vocabulary")
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens = torch.tensor([prompt], device=device)
    carry: list[Carry] | None = None
    logits = torch.empty(0)
    for segment in tokens.split(segment_tokens, dim=1):
        logits, carry = model(segment, carry, readout=_last_logits)
    for _ in range(max_tokens):
        token = sampling.draw(logits[0], generator)
        yield int(token)
        logits, carry = model(token.view(1, 1), carry, readout=_last_logits)


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [B, V] of the last step only."""
    return hidden[:, -1] @ weight.T
