"""The decision model: what was done, what is still to be earned, what is seen -> what to do.

The Decision Transformer (Chen et al. 2021, arXiv:2106.01345) over any mixers. A frame is three
tokens; the action is read off the last of them, which has seen all that came before it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import TOKENS_OF_FRAME, ModelConfig
from models.mixer import Carry
from models.stack import Readout, Stack


class FrameEmbedding(nn.Module):
    """Frames [B, T, A + 1 + S] -> tokens [B, 3 T, D], each part by a matrix of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.widths = [config.action_width, 1, config.observation_width]
        self.action, self.to_go, self.observation = (
            nn.Linear(width, config.width) for width in self.widths
        )

    def forward(self, frames: Tensor) -> Tensor:
        action, to_go, seen = frames.to(self.to_go.weight.dtype).split(self.widths, dim=-1)
        parts = self.action(action), self.to_go(to_go), self.observation(seen)
        return torch.stack(parts, dim=2).flatten(1, 2)


def actions(hidden: Tensor, weight: Tensor) -> Tensor:
    """[..., D], [A, D] -> actions [..., A] between -1 and 1; the default readout."""
    return F.linear(hidden, weight).tanh()


class DecisionModel(Stack):
    """Actions from frames: the action before, the return to go and the observation of a moment."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, FrameEmbedding(config), config.action_width)

    def forward(
        self,
        frames: Tensor,
        carry: list[Carry] | None = None,
        *,
        reset: Tensor | None = None,
        readout: Readout | None = actions,
        last: bool = False,
    ) -> tuple[Any, list[Carry]]:
        """frames [B, T, A + 1 + S] -> (what `readout` returns, the carry of the next segment).

        The default readout gives actions [B, T, A]. Carry and last as in `Stack.through`; reset
        [B, T] marks first frames.
        """
        if reset is not None:
            reset = F.pad(reset.unsqueeze(-1), (0, TOKENS_OF_FRAME - 1)).flatten(1)
        x, carries = self.through(self.embed(frames), carry, reset, last, readout is not None)
        return self.answer(x[:, TOKENS_OF_FRAME - 1 :: TOKENS_OF_FRAME], readout), carries
