"""What all models have in common: blocks of any mixers, and a head that is given to a readout."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block
from models.config import ModelConfig
from models.mixer import Carry

# What is made of the last hidden states [B, T, D] and the head's weight [V, D].
Readout = Callable[[Tensor, Tensor], Any]


class Head(nn.Linear):
    """The output projection, D -> V without bias.

    The readout runs inside the module, so that whoever shards or gathers weights by module (ZeRO
    stage 3) finds this one's in use; a loss can thus avoid logits of [T, V] without knowing of it.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Small, so that the first loss is log V."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, readout: Readout = F.linear) -> Any:
        return readout(x, self.weight)


class Stack(nn.Module):
    """embed -> blocks -> norm -> head. Deterministic given `torch.manual_seed`.

    Every module draws its own initial values, in that order. Raises ValueError for a configuration
    that has faults.
    """

    def __init__(self, config: ModelConfig, embed: nn.Module, outputs: int) -> None:
        super().__init__()
        if faults := config.faults():
            told = [f"ModelConfig.{name}: {fault}" for name, fault in faults]
            raise ValueError("\n".join(told))
        self.config = config
        self.embed = embed
        self.dropout = nn.Dropout(config.dropout)
        stack = nn.ModuleList(Block(config, name) for name in config.layer_mixers())
        self.blocks = cast(list[Block], stack)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = Head(config.width, outputs)
        # How a block is called: replaced from outside where its activations are not to be kept.
        self.call_block: Callable[..., tuple[Tensor, Carry]] = _call_block

    def through(
        self,
        x: Tensor,
        carry: list[Carry] | None,
        reset: Tensor | None,
        last: bool,
        read: bool = True,
    ) -> tuple[Tensor, list[Carry]]:
        """Embedded tokens [B, T, D] -> what the head reads [B, T, D], and the next carry.

        carry is one per layer, None for an empty history; reset [B, T] bool or uint8 marks
        documents that start afresh. With `last` no segment follows: no carry is returned, so that
        none is kept alive. Where nobody is to `read` it, x is no result: the last layer went as
        far as its carry.
        """
        if carry is not None and len(carry) != len(self.blocks):
            raise ValueError(
                f"the carry is of {len(carry)} layers, the model has {len(self.blocks)}: a carry "
                f"of `last=True`, or of another model, cannot be gone on from"
            )
        x = self.dropout(x)
        carries = []
        for layer, block in enumerate(self.blocks):
            entering = None if carry is None else carry[layer]
            carry_alone = not read and layer == len(self.blocks) - 1
            x, leaving = self.call_block(
                block, x, entering, reset=reset, last=last, carry_alone=carry_alone
            )
            if not last:
                carries.append(leaving)
        return self.norm(x) if read else x, carries

    def answer(self, x: Tensor, readout: Readout | None) -> Any:
        """What `readout` makes of it, if there is one."""
        return None if readout is None else self.head(x, readout)

    def init_carry(self, batch_size: int, device: torch.device) -> list[Carry]:
        """The carry of an empty history, one per layer."""
        return [block.mixer.init_carry(batch_size, device) for block in self.blocks]


def _call_block(block: Block, *args: Any, **kwargs: Any) -> tuple[Tensor, Carry]:
    return block(*args, **kwargs)
