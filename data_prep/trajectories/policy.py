"""The door to Stable-Baselines3: a policy trained to a stated quality, and what it did on the way.

With the library's own settings. D4RL's data are soft actor-critic's (Haarnoja et al. 2018), which
needs fewer frames; proximal policy optimization (Schulman et al. 2017) needs less time on a CPU.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from data_prep.trajectories.environment import make_environment
from data_prep.trajectories.settings import Episode, TrajectorySettings

ALGORITHMS: dict[str, type[PPO] | type[SAC]] = {"ppo": PPO, "sac": SAC}
RECENT = 10  # episodes whose mean score decides
TELL_EVERY = 10_000  # frames


class Recorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that remembers its finished episodes."""

    def __init__(self, environment: gymnasium.Env[Any, Any]) -> None:
        super().__init__(environment)
        self.episodes: list[Episode] = []
        self.frames = 0  # of finished episodes
        self._seen: list[Any] = []
        self._done: list[Any] = []
        self._earned: list[float] = []

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(**arguments)
        self._seen, self._done, self._earned = [observation], [], []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        self._done.append(action)
        self._earned.append(float(reward))
        if terminated or truncated:
            arrays = (np.array(each, np.float32) for each in (self._seen, self._done, self._earned))
            self.episodes.append(Episode(*arrays))
            self.frames += len(self._done)
        self._seen.append(observation)
        return observation, reward, terminated, truncated, info


class _UntilGood(BaseCallback):
    """Ends a training as soon as the last episodes earn enough."""

    def __init__(self, recorder: Recorder, wanted: float, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.recorder, self.wanted, self.tell = recorder, wanted, tell

    def _on_step(self) -> bool:
        if self.num_timesteps % TELL_EVERY == 0:
            self.tell(
                f"{self.num_timesteps:,} frames: mean return {recent_return(self.recorder):.0f}"
            )
        return recent_return(self.recorder) < self.wanted


def recent_return(recorder: Recorder) -> float:
    """The mean return of the last episodes; before there are so many, none is good enough."""
    last = recorder.episodes[-RECENT:]
    return float(np.mean([e.rewards.sum() for e in last])) if len(last) == RECENT else -np.inf


def train_policy(
    settings: TrajectorySettings, wanted: float, tell: Callable[[str], None]
) -> tuple[BaseAlgorithm, list[Episode], float]:
    """A policy whose last training episodes earn `wanted` on average, all of them, what it earns.

    Raises ValueError where it does not come so far.
    """
    torch.set_num_threads(1)  # small products: more threads are slower, and less repeatable
    recorder = Recorder(make_environment(settings.environment))
    algorithm = ALGORITHMS[settings.algorithm]
    policy = algorithm("MlpPolicy", recorder, seed=settings.seed, device="cpu")
    policy.learn(settings.most_frames, callback=_UntilGood(recorder, wanted, tell))
    if (reached := recent_return(recorder)) < wanted:
        raise ValueError(
            f"after {settings.most_frames:,} frames of {settings.environment} the policy earns "
            f"{reached:.0f} an episode, below {wanted:.0f}: raise --most-frames, lower --medium, "
            f"or choose another --algorithm"
        )
    return policy, recorder.episodes, reached


def act(settings: TrajectorySettings, policy: Path) -> list[Episode]:
    """Whole episodes of a saved policy that hold the frames, two at least. Actions are drawn."""
    return _played(settings, policy, lambda r: r.frames >= settings.frames and len(r.episodes) > 1)


def without_noise(settings: TrajectorySettings, policy: Path) -> float:
    """The mean return of episodes in which it does what it thinks best, and draws nothing."""
    played = _played(settings, policy, lambda r: len(r.episodes) >= RECENT, noise=False)
    return float(np.mean([episode.rewards.sum() for episode in played]))


def _played(
    settings: TrajectorySettings,
    policy: Path,
    enough: Callable[[Recorder], bool],
    noise: bool = True,
) -> list[Episode]:
    torch.set_num_threads(1)
    acting = ALGORITHMS[settings.algorithm].load(policy, device="cpu")
    acting.set_random_seed(settings.seed)
    recorder = Recorder(make_environment(settings.environment))
    observation, _ = recorder.reset(seed=settings.seed)
    while not enough(recorder):
        action, _ = acting.predict(observation, deterministic=not noise)
        observation, _, terminated, truncated, _ = recorder.step(action)
        if terminated or truncated:
            observation, _ = recorder.reset()
    return recorder.episodes


def described(settings: TrajectorySettings, frames: int) -> str:
    """A policy in a few words."""
    library = f"stable-baselines3 {version('stable-baselines3')}"
    simulator = f"gymnasium {version('gymnasium')}, mujoco {version('mujoco')}"
    return (
        f"{settings.algorithm} of {library} after {frames:,} frames, seed {settings.seed}; "
        f"{simulator}"
    )
