"""Episodes as frames: what is written is what happened, and a policy is as good as it says."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep import trajectories
from data_prep.__main__ import main as data_prep
from data_prep.schema import load_info
from data_prep.trajectories import (
    REPLAY,
    _read_episodes,
    frames_of,
    held_out,
    prepare_trajectories,
)
from data_prep.trajectories.__main__ import main
from data_prep.trajectories.settings import Episode, TrajectorySettings
from tests.trajectories import ACTED, SEEN, about, make_episodes, write_made_up
from trainer.config import DataConfig
from trainer.data import SequenceReader, TokenStream
from trainer.layout import Layout

FEW = ["--frames", "300", "--medium", "0.001"]  # what falls over after some frames is good enough


def test_a_frame_is_what_was_done_is_to_be_earned_is_seen_and_what_is_done():
    episode = Episode(
        observations=np.array([[1, 2], [3, 4], [5, 6]], np.float32),
        actions=np.array([[0.1], [0.2], [0.3]], np.float32),
        rewards=np.array([1, 2, 4], np.float32),
    )
    info = about(make_episodes(2))
    info.observation_mean, info.observation_deviation = [1, 2], [2, 4]
    info.return_scale = 14
    expected = [
        [0, 7 / 14, 0, 0, 0.1],
        [0.1, 6 / 14, 1, 0.5, 0.2],
        [0.2, 4 / 14, 2, 1, 0.3],
    ]
    np.testing.assert_allclose(frames_of(episode, info), expected, rtol=1e-6)


def test_what_is_read_is_what_was_written(tmp_path):
    """Frame by frame, over the edges of blocks, with resets where an episode begins."""
    folder, episodes = write_made_up(tmp_path / "set"), make_episodes(60)
    info = about(episodes)
    training = [e for n, e in enumerate(episodes) if not held_out(n, len(episodes))]
    expected = np.concatenate([frames_of(e, info) for e in training])
    stream = TokenStream(DataConfig(path=str(folder)), "train")
    assert stream.tokens == [len(expected)]
    batch = SequenceReader(stream, Layout(900), with_reset=True).micro_batch([100])
    got = np.concatenate([batch.inputs[0], batch.labels[0]], axis=1)
    np.testing.assert_array_equal(got, expected[100:1000])
    assert batch.labels.shape == (1, 900, ACTED)
    assert batch.inputs.shape == (1, 900, ACTED + 1 + SEEN)
    assert batch.reset is not None
    begins = np.cumsum([0] + [len(e.rewards) for e in training])
    begun = begins[(begins >= 100) & (begins < 1000)] - 100
    assert np.flatnonzero(batch.reset[0].numpy()).tolist() == begun.tolist()
    assert data_prep(["verify", str(folder)]) == 0


def test_held_out_episodes_are_no_longer_in_the_order_of_learning(tmp_path):
    """A run evaluates on the first so many frames, and the first that a policy did is its worst."""
    folder, episodes = write_made_up(tmp_path / "set", 600), make_episodes(600)
    kept = {n: e for n, e in enumerate(episodes) if held_out(n, len(episodes))}
    info = about(episodes)
    begins = {tuple(frames_of(e, info)[0]): n for n, e in kept.items()}
    stream = TokenStream(DataConfig(path=str(folder)), "held_out")
    frames, starts = stream.read(0, stream.tokens[0])
    order = [begins[tuple(frames[start])] for start in starts]
    assert sorted(order) == list(kept)
    assert np.mean(order[: len(order) // 3]) == pytest.approx(300, abs=100)


def test_a_number_that_is_not_finite_is_found(tmp_path, capsys):
    from data_prep.trajectories import write_episodes

    episodes = make_episodes(30)
    episodes[3].observations[5, 1] = np.nan
    write_episodes(episodes, about(episodes), "made up", tmp_path / "set")
    assert data_prep(["verify", str(tmp_path / "set")]) == 1
    assert "not finite" in capsys.readouterr().err


def test_a_policy_is_as_good_as_its_last_ten_episodes():
    from data_prep.trajectories.policy import _UntilGood, recent_return

    recorder: Any = SimpleNamespace(episodes=[])
    goes_on, told = [], []
    until_good = _UntilGood(recorder, 20.0, told.append)
    for earned in (*[100.0] * 3, *[0.0] * 9, *[20.0] * 10):
        rewards = np.full(4, earned / 4, np.float32)
        recorder.episodes.append(Episode(np.zeros((5, 2)), np.zeros((4, 1)), rewards))
        goes_on.append(until_good._on_step())
    assert goes_on == [True] * 9 + [False] * 2 + [True] * 10 + [False]
    assert recent_return(recorder) == 20
    assert told[0] == "0 frames: mean return -inf"


@pytest.mark.slow
def test_a_policy_and_its_two_datasets(tmp_path, capsys):
    """Of one command: the frames of the environment, held out by episode, the same ever again."""
    out = tmp_path / "hopper"
    assert main(["Hopper-v5", "--out", str(out), *FEW]) == 0
    printed = capsys.readouterr().out
    medium, replay = (load_info(out / name) for name in ("medium", "medium-replay"))
    for info, name in ((medium, "medium"), (replay, "medium-replay")):
        frames = info.trajectories
        assert frames is not None
        assert (frames.environment, frames.quality) == ("Hopper-v5", name)
        assert (frames.observation_width, frames.action_width) == (11, 3)
        assert f"{info.splits['train'].tokens:,} frames" in printed
        least, most = frames.score_returns
        assert frames.score(least) == 0
        assert frames.score(most) == 100
        assert least + 0.001 * (most - least) < frames.returns[-1]
        assert frames.without_noise is not None
        assert f"without noise earns {frames.without_noise:.0f}, a score of" in printed
        earned = [e.rewards.sum() for e in _read_episodes(out / REPLAY)]
        means = [np.mean(earned[at - 10 : at]) for at in range(10, len(earned) + 1)]
        assert frames.policy_return == pytest.approx(means[-1])
        # it went on until it was good, and no further
        assert means[-1] >= least + 0.001 * (most - least) > max(means[:-1], default=-np.inf)
        stream = TokenStream(DataConfig(path=str(out / name)), "train")
        batch = SequenceReader(stream, Layout(16), True).micro_batch([0])
        # an action is the one before it of the next frame; standardised numbers; a return to go
        # falls by what is earned, and a hopper earns something at every frame
        np.testing.assert_array_equal(batch.inputs[0, 1:10, :3], batch.labels[0, :9])
        assert batch.inputs[0, :, 4:].abs().max() < 20
        assert (batch.inputs[0, 1:10, 3] < batch.inputs[0, :9, 3]).all()
    assert medium.splits["train"].tokens + medium.splits["held_out"].tokens >= 300
    assert data_prep(["verify", str(out / "medium")]) == 0
    known = json.loads((out / "policy.json").read_text())
    assert known["policy"].startswith("ppo of stable-baselines3")
    index = (out / "medium" / "dataset.json").read_bytes()
    assert main(["Hopper-v5", "--out", str(out), *FEW]) == 0
    assert (out / "medium" / "dataset.json").read_bytes() == index
    again = tmp_path / "again"
    assert main(["Hopper-v5", "--out", str(again), *FEW]) == 0
    for name in ("medium", "medium-replay"):
        one, other = load_info(out / name), load_info(again / name)
        assert one.fingerprint == other.fingerprint
        assert one.splits == other.splits
    assert main(["Hopper-v5", "--out", str(out), "--frames", "301"]) == 1
    assert "of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Nothing-v0"], "no scores are known of environment 'Nothing-v0'"),
        (["Hopper-v5", "--medium", "0"], "--medium 0.0 is not above 0"),
        (["Hopper-v5", "--frames", "0"], "must be positive"),
        (["Hopper-v5", "--algorithm", "ddpg"], "--algorithm ddpg is not ppo or sac"),
        (["Hopper-v99"], "cannot be made"),
        (["Hopper-v3"], "environment 'Hopper-v3' cannot be made"),
        (["Hopper-v5", "--out", "s3://bucket/hopper"], "is an address"),
    ],
)
def test_what_cannot_be_made_is_told(tmp_path, capsys, arguments, told):
    assert main(["--out", str(tmp_path / "x"), *arguments]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_interrupted_it_goes_on(tmp_path, monkeypatch):
    """What was written of a policy before it was described is made again."""
    out = tmp_path / "hopper"
    out.mkdir()
    for name in ("policy.zip", "replay.tmp"):
        (out / name).write_bytes(b"half")
    few = ["--frames", "1", *FEW[2:]]  # two episodes all the same: one is held out
    assert main(["Hopper-v5", "--out", str(out), *few]) == 0
    assert load_info(out / "medium-replay").splits["train"].tokens > 0
    assert load_info(out / "medium").splits["held_out"].documents == 1

    def locked(*_: Any, **__: Any) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(trajectories, "only_writer", locked)
    assert main(["Hopper-v5", "--out", str(out), *few]) == 0  # found written, nothing is locked


@pytest.mark.slow
def test_a_policy_that_stays_bad_is_told(tmp_path, capsys):
    arguments = ["--most-frames", "2048", "--medium", "1"]
    assert main(["Hopper-v5", "--out", str(tmp_path / "x"), *arguments]) == 1
    told = capsys.readouterr().err
    assert "below 3234" in told
    assert "--most-frames" in told
    assert not (tmp_path / "x").exists()


def test_a_policy_of_other_settings_or_unreadable_is_told(tmp_path):
    (tmp_path / "out").mkdir()
    for text, told in (("{", "cannot be read"), ('{"return": 1}', "cannot be read")):
        (tmp_path / "out" / "policy.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            prepare_trajectories(TrajectorySettings("Hopper-v5"), tmp_path / "out")
