"""What decides a policy and its datasets, and what comes of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TrajectorySettings:
    """Of `python -m data_prep.trajectories`."""

    environment: str
    frames: int = 100_000  # of `medium`, at least: whole episodes
    algorithm: str = "ppo"  # by which the policy learns, or sac
    medium: float = 1 / 3  # of an expert's score, at which the policy stops learning
    most_frames: int = 1_000_000  # to learn that in
    seed: int = 0


@dataclass(frozen=True)
class Episode:
    """What was seen, done and earned: observations [T, S], actions [T, A], rewards [T]."""

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]


@dataclass(frozen=True)
class PolicyInfo:
    """What is known of a folder's policy: its policy.json."""

    settings: dict[str, Any]  # TrajectorySettings
    policy: str  # in a few words
    earned: float  # on average, in the last episodes of its training
    sha256: str  # of the replay: the policy's own file has its date in it
    score_returns: list[float]  # of the normalised scores 0 and 100
    # on average, in episodes that are played for this figure alone; None in folders of older code
    without_noise: float | None = None
