"""The language model: embed -> blocks -> norm -> head."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.mixer import Carry
from models.stack import Readout, Stack


class LanguageModel(Stack):
    """Next-token model over any mixers.

    The embedding's initial values are N(0, 1), or the head's where they share a matrix.
    """

    embed: nn.Embedding

    def __init__(self, config: ModelConfig) -> None:
        embed = nn.Embedding(config.vocab_size, config.width)
        super().__init__(config, embed, config.vocab_size)
        if config.tie_embeddings:
            self.embed.weight = self.head.weight

    def forward(
        self,
        tokens: Tensor,
        carry: list[Carry] | None = None,
        *,
        reset: Tensor | None = None,
        readout: Readout | None = F.linear,
        last: bool = False,
    ) -> tuple[Any, list[Carry]]:
        """tokens [B, T] int64 -> (what `readout` returns, the carry of the next segment).

        The default readout gives logits [B, T, V]; with None the carry alone is wanted. Carry,
        reset and last as in `Stack.through`.
        """
        x, carries = self.through(self.embed(tokens), carry, reset, last, readout is not None)
        return self.answer(x, readout), carries
