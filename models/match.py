"""Models of other mixers with as many parameters, so that a comparison compares like with like."""

from dataclasses import replace
from math import lcm
from typing import Any

from models.config import ModelConfig
from models.flops import parameters
from models.mixers import MIXERS

TOLERANCE = 0.02


def match_parameters(config: ModelConfig, target: int, by: str = "width") -> ModelConfig:
    """`config` with its width (or its layers) solved so that it has `target` parameters.

    Widths are multiples of 8 a head, so a width alone seldom fits: the MLP takes up the rest, in
    multiples of 8. Of all that fit, the one whose MLP is nearest to the configured
    mlp_ratio. Raises ValueError where none is within 2 %.
    """
    assert by in ("width", "layers")
    step = 1
    if by == "width":
        step = lcm(*(MIXERS[name].width_step(config) for name in config.layer_mixers()))
    best: tuple[float, ModelConfig] | None = None
    for size in range(step, 1 << 16, step):
        changes: dict[str, Any] = {by: size, "mlp_ratio": 0.0}
        bare = replace(config, **changes)
        room = target - parameters(bare)
        if room < -TOLERANCE * target:
            break  # larger ones only have more
        candidate = bare
        if config.mlp_ratio:
            per_column = 3 * bare.width * bare.layers
            hidden = round((room - bare.layers * bare.width) / per_column / 8) * 8
            candidate = replace(bare, mlp_ratio=max(0, hidden) / bare.width)
        if abs(parameters(candidate) - target) > TOLERANCE * target:
            continue
        distance = abs(candidate.mlp_ratio - config.mlp_ratio)
        if best is None or distance < best[0]:
            best = distance, candidate
    if best is None:
        raise ValueError(
            f"no {by} gives {config.mixer} {target} parameters to {TOLERANCE:.0%}: "
            f"choose another number of parameters, or match the other of width and layers"
        )
    return best[1]
