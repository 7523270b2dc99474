"""What a decision model earns: episodes played with it in the environment of its data."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.schema import load_info
from data_prep.task import TrajectoryInfo
from data_prep.trajectories.environment import make_environment
from models.decision import DecisionModel
from models.mixer import Carry
from trainer.run_folder import RunFolder
from trainer.trained import load_trained


@dataclass(frozen=True)
class Rollouts:
    """Episodes of one model. A score of 0 is a random policy's, 100 an expert's."""

    environment: str
    score: float  # normalised, the mean of the episodes
    returns: list[float]
    lengths: list[int]  # frames of each
    asked: float  # the return that the model was asked for
    frames: int | None  # of the past that it saw at a time; None: all
    policy_score: float | None = None  # of the policy that made the data, without its noise


def roll_out(
    run: Path,
    episodes: int,
    device: torch.device,
    first_seed: int = 0,
    asked: float | None = None,
    frames: int | None = None,
) -> Rollouts:
    """Play episodes side by side with a run's newest checkpoint.

    They begin by the seeds from `first_seed` on. Asked for is a return, the best of the training
    data where it is None. What was earned is taken off it as the episode goes on. The model sees
    the last `frames` frames, read anew each time, as the Decision Transformer does; None: all, by
    the carry. Raises ValueError for a run of no decision model, and for what cannot be asked.
    """
    for name, value in (("episodes", episodes), ("frames", frames)):
        if value is not None and value < 1:
            raise ValueError(f"{value} {name} are not positive")
    if asked is not None and not math.isfinite(asked):
        raise ValueError(f"a return of {asked} cannot be asked for: give a number")
    info = load_info(run).trajectories if RunFolder(run).data.exists() else None
    if info is None:
        raise ValueError(f"{run} is not a run on what data_prep.trajectories writes")
    model, _ = load_trained(run, device)
    asked = info.returns[-1] if asked is None else asked
    returns, lengths = _play(_Player(model, info, frames, device), episodes, first_seed, asked)
    return Rollouts(
        environment=info.environment,
        score=mean(info.score(each) for each in returns),
        returns=returns,
        lengths=lengths,
        asked=asked,
        frames=frames,
        policy_score=None if info.without_noise is None else info.score(info.without_noise),
    )


class _Player:
    """A model that acts in some environments side by side."""

    def __init__(
        self, model: DecisionModel, info: TrajectoryInfo, frames: int | None, device: torch.device
    ) -> None:
        self.info, self._model, self._frames, self._device = info, model, frames, device
        self._mean = np.array(info.observation_mean)
        self._deviation = np.array(info.observation_deviation)
        self._carry: list[Carry] | None = None
        self._window: Tensor | None = None  # [E, frames, A + 1 + S]

    @torch.inference_mode()
    def act(
        self,
        before: NDArray[np.float32],
        to_go: NDArray[np.float64],
        seen: NDArray[np.float64],
    ) -> NDArray[np.float32]:
        """Actions before [E, A], returns to go [E] and observations [E, S] -> actions [E, A]."""
        scaled = [
            before,
            to_go[:, None] / self.info.return_scale,
            (seen - self._mean) / self._deviation,
        ]
        frame = torch.from_numpy(np.concatenate(scaled, 1, dtype=np.float32)).to(self._device)
        frame = frame.unsqueeze(1)
        if self._frames is None:
            actions, self._carry = self._model(frame, self._carry)
        else:
            past = frame if self._window is None else torch.cat([self._window, frame], 1)
            self._window = past[:, -self._frames :]
            actions, _ = self._model(self._window, last=True)
        return actions[:, -1].float().cpu().numpy()


def _play(player: _Player, episodes: int, seed: int, asked: float) -> tuple[list[float], list[int]]:
    """Returns and lengths of the episodes, all begun at once; one that has ended waits."""
    environments = [make_environment(player.info.environment) for _ in range(episodes)]
    seen = np.stack([e.reset(seed=seed + n)[0] for n, e in enumerate(environments)])
    earned, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    running = np.ones(episodes, np.bool_)
    actions = np.zeros((episodes, player.info.action_width), np.float32)
    while running.any():
        actions = player.act(actions, asked - earned, seen)
        for number in np.flatnonzero(running):
            observation, reward, terminated, truncated, _ = environments[number].step(
                actions[number]
            )
            seen[number] = observation
            earned[number] += float(reward)
            lengths[number] += 1
            running[number] = not (terminated or truncated)
    for environment in environments:
        environment.close()
    return earned.tolist(), lengths.tolist()
