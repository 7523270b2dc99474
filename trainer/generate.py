"""Continue a text: with constant memory and time per token, unless a layer is full attention."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from data_prep.schema import load_info
from data_prep.tokenizer import Tokenizer, folder_tokenizer
from models.lm import LanguageModel
from models.mixer import Carry
from trainer.run_folder import RunFolder
from trainer.trained import load_trained


@dataclass(frozen=True)
class Trained:
    """What a run's folder holds for those who use its model."""

    model: LanguageModel
    tokenizer: Tokenizer
    step: int  # that the weights are of
    known: Tensor  # [V] bool: the ids that stand for something
    end_of_document: int | None = None


def load_run(folder: Path, device: torch.device) -> Trained:
    """The model of a run's newest intact checkpoint, and its tokenizer.

    Raises ValueError where the folder holds no run, or none of either.
    """
    model, step = load_trained(folder, device)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{folder} holds a decision model, which writes no text: use rollout")
    run = RunFolder(folder)
    info = load_info(folder) if run.data.exists() else None  # runs of older versions have none
    tokenizer = folder_tokenizer(folder)
    end = info.end_of_document if info else None
    known = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    lengths = torch.from_numpy(tokenizer.token_bytes())[: len(known)]
    known[: len(lengths)] = lengths >= 0
    if info and info.synthetic:  # tokens that are no text
        known[: info.vocab_size] = True
    if end is not None:
        known[end] = True
    return Trained(model, tokenizer, step, known.to(device), end)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ValueError for what means nothing.

    Temperature 0 takes the likeliest; else one of the `top_k` likeliest (0: of all), and of those
    the fewest that have `top_p` of the probability together.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    known: Tensor | None = None  # [V] bool: no other token is drawn

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} is not a number from 0 on")
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k} is negative: use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is not above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is not from 0 to 2^63 - 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token, from logits [V]. Raises ValueError where these are not finite."""
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: are its weights?")
        if self.known is not None:
            logits = logits.masked_fill(~self.known, float("-inf"))
        if self.temperature == 0:
            return logits.argmax()
        logits = (logits - logits.max()).double() / self.temperature  # the highest stays finite
        if 0 < self.top_k < logits.numel():
            best, places = logits.topk(self.top_k)
            logits = torch.full_like(logits, float("-inf")).scatter(0, places, best)
        chances = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = chances.sort(descending=True)
            unneeded = ordered.cumsum(0) - ordered >= self.top_p
            chances = chances.scatter(0, places[unneeded], 0.0)
        return torch.multinomial(chances, 1, generator=generator)[0]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Iterable[int],
    max_tokens: int,
    sampling: Sampling,
    segment_tokens: int = 4096,
    on_read: Callable[[int], None] = lambda read: None,
) -> Iterator[int]:
    """Tokens that continue `prompt`, one by one. `on_read` is told how many tokens of the
    prompt are read.

    The prompt, of any length, is taken and read in segments of `segment_tokens`; what is kept
    between segments and between tokens is the model's carry, whose size does not grow but for full
    attention's, which holds keys and values of all that was read.
    Raises ValueError for an empty prompt or a token outside the vocabulary.
    """
    if segment_tokens < 1:
        raise ValueError(f"segments of {segment_tokens} tokens are not positive")
    device, coming = model.embed.weight.device, iter(prompt)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    carry: list[Carry] | None = None
    logits, read = torch.empty(0), 0
    while segment := list(islice(coming, segment_tokens)):
        for end in (min(segment), max(segment)):
            if not 0 <= end < model.config.vocab_size:
                raise ValueError(f"the prompt has token {end}, outside the model's vocabulary")
        tokens = torch.tensor([segment], device=device)
        logits, carry = model(tokens, carry, readout=_last_logits)
        read += len(segment)
        on_read(read)
    if not read:
        raise ValueError("the prompt is empty: give at least one token")
    for _ in range(max_tokens):
        token = sampling.draw(logits[0], generator)
        yield int(token)
        logits, carry = model(token.view(1, 1), carry, readout=_last_logits)


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [B, V] of the last step only."""
    return hidden[:, -1] @ weight.T
