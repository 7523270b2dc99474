"""Episodes of a made-up environment, written as data_prep.trajectories writes them."""

from pathlib import Path

import numpy as np

from data_prep.task import TrajectoryInfo
from data_prep.trajectories import write_episodes
from data_prep.trajectories.settings import Episode

SEEN, ACTED = 11, 3  # numbers, as many as Hopper's


def make_episodes(count: int, seed: int = 0) -> list[Episode]:
    """Of 20 to 60 frames; an action is the last observation's first numbers, so it takes memory."""
    generator = np.random.default_rng(seed)
    episodes = []
    for length in generator.integers(20, 60, count):
        seen = generator.normal(size=(length, SEEN)).astype(np.float32)
        acted = np.zeros((length, ACTED), np.float32)
        acted[1:] = np.tanh(seen[:-1, :ACTED])
        rewards = generator.uniform(0, 1, length).astype(np.float32)
        episodes.append(Episode(seen, acted, rewards))
    return episodes


def about(episodes: list[Episode]) -> TrajectoryInfo:
    returns = [float(episode.rewards.sum()) for episode in episodes]
    return TrajectoryInfo(
        environment="Hopper-v5",
        observation_width=SEEN,
        action_width=ACTED,
        quality="medium",
        policy="made up",
        policy_return=float(np.mean(returns)),
        returns=[min(returns), float(np.mean(returns)), max(returns)],
        return_scale=max(returns),
        observation_mean=[0.5] * SEEN,
        observation_deviation=[2.0] * SEEN,
        score_returns=[0.0, 100.0],
    )


def write_made_up(folder: Path, count: int = 60) -> Path:
    """A dataset of them."""
    episodes = make_episodes(count)
    write_episodes(episodes, about(episodes), "made up", folder)
    return folder
