"""What decides a policy and its datasets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrajectorySettings:
    """Of `python -m data_prep.trajectories`."""

    environment: str
    frames: int = 100_000  # of `medium`, at least: whole episodes
    algorithm: str = "ppo"  # by which the policy learns, or sac
    medium: float = 1 / 3  # of an expert's score, at which the policy stops learning
    most_frames: int = 1_000_000  # to learn that in
    seed: int = 0
