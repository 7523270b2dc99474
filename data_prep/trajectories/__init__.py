"""What a policy did in an environment, as sequences of frames: a dataset as any other.

A folder of one policy has two datasets, as D4RL names them (Fu et al. 2020, arXiv:2004.07219):
`medium`, what a policy of a third of an expert's score does, and `medium-replay`, all it did while
it learned that. How a frame is written is task.TrajectoryInfo's.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import file_sha256, write_whole, written_whole
from data_prep.parts import PartWriter, Told
from data_prep.schema import DatasetInfo
from data_prep.task import TrajectoryInfo
from data_prep.trajectories.settings import Episode, PolicyInfo, TrajectorySettings
from data_prep.write import Settings, existing_dataset, only_writer, seal_dataset

QUALITIES = ("medium", "medium-replay")
POLICY, POLICY_INFO, REPLAY = "policy.zip", "policy.json", "replay.npz"
# what an interruption may leave, which is made again
UNFINISHED = {POLICY, REPLAY, "policy.tmp", "replay.tmp"}
BLOCK_FRAMES = 256  # a sequence is some tens of frames long
HELD_OUT_EVERY = 20  # an episode of so many
Tell = Callable[[str], None]


def prepare_trajectories(
    settings: TrajectorySettings, out: Path, tell: Tell = print
) -> dict[str, DatasetInfo]:
    """Write OUT/medium and OUT/medium-replay, or find them written; by quality.

    Interrupted, it goes on where a policy is there already. Raises ValueError for what cannot be
    made, and for a folder that holds something else.
    """
    _check(settings)
    if all((out / name).exists() for name in (POLICY_INFO, *QUALITIES)):  # nothing to write
        return _datasets(settings, out, tell)
    with only_writer(partial := out.with_name(out.name + ".partial"), out, goes_on=True):
        try:
            return _datasets(settings, out, tell)
        finally:
            shutil.rmtree(partial)


def _datasets(settings: TrajectorySettings, out: Path, tell: Tell) -> dict[str, DatasetInfo]:
    known = _policy(settings, out, tell)
    return {quality: _dataset(settings, out, quality, known) for quality in QUALITIES}


def _check(settings: TrajectorySettings) -> None:
    from data_prep.trajectories.policy import ALGORITHMS

    if min(settings.frames, settings.most_frames) < 1:
        raise ValueError("--frames and --most-frames must be positive")
    if not 0 < settings.medium <= 1:
        raise ValueError(f"--medium {settings.medium} is not above 0 and at most 1")
    if settings.algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {settings.algorithm} is not {' or '.join(ALGORITHMS)}")


def _policy(settings: TrajectorySettings, out: Path, tell: Tell) -> PolicyInfo:
    """What is known of the folder's policy, which is trained where there is none."""
    from data_prep.trajectories.environment import score_returns
    from data_prep.trajectories.policy import described, train_policy, without_noise

    about = out / POLICY_INFO
    if about.exists():
        try:
            known = PolicyInfo(**json.loads(about.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{about} cannot be read ({error}): remove {out}") from None
        if known.settings != asdict(settings):
            raise ValueError(f"{out} is of other settings, {known.settings}: choose another --out")
        return known
    if out.exists() and {path.name for path in out.iterdir()} - UNFINISHED:
        raise ValueError(f"{out} exists and holds no policy of this command: choose another --out")
    least, most = score_returns(settings.environment)
    wanted = least + settings.medium * (most - least)
    tell(f"training a policy for {settings.environment} until it earns {wanted:.0f} an episode")
    policy, episodes, reached = train_policy(settings, wanted, tell)
    out.mkdir(parents=True, exist_ok=True)
    policy.save(saved := BytesIO())
    with written_whole(out / POLICY) as f:
        f.write(saved.getvalue())
    with written_whole(out / REPLAY) as f:
        np.savez(f, **_arrays(episodes))
    known = PolicyInfo(
        settings=asdict(settings),
        policy=described(settings, policy.num_timesteps),
        earned=reached,
        sha256=file_sha256(out / REPLAY),
        score_returns=[least, most],
        without_noise=without_noise(settings, out / POLICY),
    )
    # last: it says that the rest is there
    write_whole(about, json.dumps(asdict(known), indent=2) + "\n")
    return known


def _dataset(
    settings: TrajectorySettings, out: Path, quality: str, known: PolicyInfo
) -> DatasetInfo:
    described = json.dumps([asdict(known), quality, BLOCK_FRAMES, HELD_OUT_EVERY, "mixed"])
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    if (out / quality).exists():
        return existing_dataset(out / quality, fingerprint)
    if quality == "medium":
        from data_prep.trajectories.policy import act

        episodes = act(settings, out / POLICY)
    else:
        episodes = _read_episodes(out / REPLAY)
    if len(episodes) < 2:
        raise ValueError(f"{len(episodes)} episodes are too few to keep one: raise --frames")
    about = _about(settings.environment, quality, known, episodes)
    return write_episodes(episodes, about, fingerprint, out / quality)


def _about(
    environment: str, quality: str, known: PolicyInfo, episodes: list[Episode]
) -> TrajectoryInfo:
    training = [e for n, e in enumerate(episodes) if not held_out(n, len(episodes))]
    returns = [float(e.rewards.sum()) for e in training]
    seen = np.concatenate([e.observations for e in training]).astype(np.float64)
    return TrajectoryInfo(
        environment=environment,
        observation_width=seen.shape[1],
        action_width=training[0].actions.shape[1],
        quality=quality,
        policy=known.policy,
        policy_return=known.earned,
        returns=[min(returns), float(np.mean(returns)), max(returns)],
        return_scale=max(max(map(abs, returns)), 1e-6),
        observation_mean=seen.mean(0).tolist(),
        observation_deviation=(seen.std(0) + 1e-6).tolist(),
        score_returns=known.score_returns,
        without_noise=known.without_noise,
    )


def held_out(number: int, episodes: int) -> bool:
    """Whether an episode is kept for evaluation: one of 20, or the last of fewer."""
    return number % HELD_OUT_EVERY == min(HELD_OUT_EVERY, episodes) - 1


def frames_of(episode: Episode, about: TrajectoryInfo) -> NDArray[np.float32]:
    """[T, width] the frames of an episode, as task.TrajectoryInfo has them."""
    before = np.zeros_like(episode.actions)
    before[1:] = episode.actions[:-1]
    to_go = np.cumsum(episode.rewards[::-1], dtype=np.float64)[::-1, None] / about.return_scale
    seen = episode.observations - np.array(about.observation_mean)
    seen /= np.array(about.observation_deviation)
    return np.concatenate([before, to_go, seen, episode.actions], 1, dtype=np.float32)


def write_episodes(
    episodes: list[Episode], about: TrajectoryInfo, fingerprint: str, out: Path
) -> DatasetInfo:
    """Write DIR from episodes. Raises ValueError where there are too few to keep one.

    Those that are held out are mixed: a run evaluates on the first so many frames, and while a
    policy learned its first episodes were its worst.
    """
    info = DatasetInfo(
        tokenizer="none",
        vocab_size=1,
        block_size=BLOCK_FRAMES,
        dtype="float32",
        fingerprint=fingerprint,
        trajectories=about,
    )
    partial = out.with_name(out.name + ".partial")
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    part = partial / "parts" / "episodes.npz"
    writer = PartWriter(part, info.dtype)
    for mixed in np.random.default_rng(0).permutation(len(episodes)):
        if held_out(number := int(mixed), len(episodes)):
            writer.add(frames_of(episodes[number], about), (0, True, number, 1))
    for number, episode in enumerate(episodes):
        if not held_out(number, len(episodes)):
            writer.add(frames_of(episode, about), (0, True, number, 0))
    writer.close(Told([], []))
    seal_dataset([part], info, Settings(block_size=info.block_size), partial, out)
    return info


def _arrays(episodes: list[Episode]) -> dict[str, NDArray[Any]]:
    return {
        "observations": np.concatenate([e.observations for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "lengths": np.array([len(e.rewards) for e in episodes]),
    }


def _read_episodes(path: Path) -> list[Episode]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            parts = (np.split(arrays[n], ends) for n in ("observations", "actions", "rewards"))
            return [Episode(*each) for each in zip(*parts, strict=True)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {path.parent}") from None
