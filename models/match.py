"""Models of other mixers with as many parameters, so that a comparison compares like with like."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from math import lcm
from typing import Any

from models.config import ModelConfig
from models.flops import parameters
from models.mixers import MIXERS

TOLERANCE = 0.02
_LARGEST = 1 << 16
_NEAR = 4  # sizes looked at on both sides of the best


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

    # Larger models have less room for an MLP: the wanted one lies where its width passes the ratio.
    sizes = range(step, _LARGEST, step)

    def has_mlp_below(ratio: float) -> Callable[[int], bool]:
        return lambda size: _solve(config, target, by, size)[0].mlp_ratio < ratio

    if config.mlp_ratio:
        at = bisect_left(sizes, True, key=has_mlp_below(config.mlp_ratio))
        above = _solve(config, target, by, sizes[max(0, at - 1)])[0].mlp_ratio
        first = bisect_left(sizes, True, hi=at, key=has_mlp_below(above + 1e-9))
        near = [*sizes[max(0, first - _NEAR) : first + 1], *sizes[at : at + _NEAR]]
    else:
        least = (1 - TOLERANCE) * target
        at = bisect_left(sizes, least, key=lambda n: target - _solve(config, target, by, n)[1])
        near = [*sizes[at : at + 1]]
    best: tuple[float, ModelConfig] | None = None
    for size in near:
        solved, _ = _solve(config, target, by, size)
        if abs(parameters(solved) - target) > TOLERANCE * target:
            continue
        distance = abs(solved.mlp_ratio - config.mlp_ratio)
        if best is None or distance < best[0]:
            best = distance, solved
    if best is None:
        raise ValueError(
            f"no {by} gives {config.mixer} {target} parameters to {TOLERANCE:.0%}: "
            f"choose another number of parameters, or match the other of width and layers"
        )
    return best[1]


def _solve(config: ModelConfig, target: int, by: str, size: int) -> tuple[ModelConfig, int]:
    """The model of that size, its MLP as wide as there is room; and the room without one."""
    changes: dict[str, Any] = {by: size, "mlp_ratio": 0.0}
    bare = replace(config, **changes)
    room = target - parameters(bare)
    if not config.mlp_ratio:
        return bare, room
    per_column = 3 * bare.width * bare.layers
    hidden = round((room - bare.layers * bare.width) / per_column / 8) * 8
    return replace(bare, mlp_ratio=max(0, hidden) / bare.width), room
