"""The door to gymnasium: environments whose actions lie between -1 and 1, and their scores."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import RescaleAction

# The returns of the normalised scores 0 and 100: D4RL's, of a random policy and of an expert, an
# environment a line. Theirs are of older versions of the same robots (Fu et al. 2020,
# arXiv:2004.07219).
SCORE_RETURNS = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}


def make_environment(name: str) -> gymnasium.Env[Any, Any]:
    """Raises ValueError where there is none of that name, or one of other numbers than a vector."""
    try:
        environment = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:  # the latter of versions of mujoco-py
        raise ValueError(f"environment {name!r} cannot be made: {error}") from None
    spaces = environment.observation_space, environment.action_space
    if not all(isinstance(space, Box) and len(space.shape) == 1 for space in spaces):
        raise ValueError(
            f"environment {name!r} has observations {spaces[0]} and actions {spaces[1]}: choose "
            f"one where both are vectors"
        )
    return RescaleAction(environment, np.float32(-1), np.float32(1))


def score_returns(name: str) -> tuple[float, float]:
    """Raises ValueError where an environment's are not known."""
    robot = name.rpartition("-v")[0]
    if robot not in SCORE_RETURNS:
        known = ", ".join(f"{each}-v5" for each in SCORE_RETURNS)
        raise ValueError(f"no scores are known of environment {name!r}: choose one of {known}")
    return SCORE_RETURNS[robot]
