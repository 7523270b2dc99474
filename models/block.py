"""One block of the stack: norm -> mixer -> norm -> MLP, each beside a residual."""

from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import SwiGLU
from models.mixer import Carry, build_mixer


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); [B, T, D] -> [B, T, D] and the mixer's carry."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = build_mixer(mixer, config)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp: SwiGLU | None = None
        if config.mlp_width:
            self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
            self.mlp = SwiGLU(config.width, config.mlp_width, config.residual_scale)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
        carry_alone: bool = False,
    ) -> tuple[Tensor, Carry]:
        """With `carry_alone` what follows the mixer is left out, and x is no result."""
        y, carry = self.mixer(self.mixer_norm(x), carry, reset=reset, last=last)
        x = x + self.dropout(y)
        if self.mlp is not None and not carry_alone:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, carry
