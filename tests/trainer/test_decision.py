"""Decision models through the whole trainer: sharded, resumed, evaluated, played."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.schema import INFO_NAME
from launch.__main__ import main
from models.build import build_model
from models.config import ModelConfig
from tests.trainer.runs import figures, plain_training, run, warnings
from tests.trajectories import about, make_episodes, write_made_up
from trainer import rollout
from trainer.config import ConfigError, load_config
from trainer.data import SequenceReader, TokenStream
from trainer.layout import Layout
from trainer.loss import summed_squared_error
from trainer.rollout import _Player, roll_out
from trainer.run_folder import RunFolder

SHARDED = ["model.mixer=[mingru,window]", "parallel.sp=2"]


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> Path:
    return write_made_up(tmp_path_factory.mktemp("frames") / "set")


@pytest.fixture
def decision_file(tmp_path, frames) -> Path:
    path = tmp_path / "decision.yaml"
    path.write_text(
        f"""
run: {{dir: {tmp_path / "run"}}}
data: {{path: {frames}, reset_state: true}}
model: {{layers: 2, width: 16, memory_tokens: 16, window: 20}}
train: {{steps: 5, seq_len: 48, batch_size: 4, micro_batch_size: 2}}
optim: {{warmup_steps: 2, clip: 0.5}}
evaluate: {{sequences: 4, rollouts: 2, rollout_frames: 8}}
"""
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deepspeed.zero_stage=3", "train.segment_len=24"])
def test_shards_of_frames_equal_plain_torch(decision_file, how):
    """Episodes cut anywhere, over two ranks of a sequence, and over segments."""
    expected = plain_training(decision_file, SHARDED[0])
    trained = figures(run(decision_file, 2, *SHARDED, how))
    assert len(trained) == 5
    for got, want in zip(trained, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    result = json.loads((decision_file.parent / "run" / "evaluation.json").read_text())
    assert result["bits_per_byte"] is None
    assert result["accuracy"] is None
    assert result["tokens"] == 2 * 48  # of the three episodes held out
    assert 0 < result["loss"] < 1
    played = result["rollouts"]
    assert len(played["returns"]) == 2
    assert played["score"] == pytest.approx(np.mean(played["returns"]))  # 0 to 100, as `about` says


@pytest.mark.slow
def test_a_run_on_frames_goes_on_to_the_bit(decision_file):
    """Stopped after two of five steps, and the five in one go."""
    whole = figures(run(decision_file, 1))
    other = f"run.dir={decision_file.parent / 'parts'}"
    first = figures(run(decision_file, 1, other, "train.stop_after=2"))
    assert first + figures(run(decision_file, 1, other)) == whole


@pytest.mark.slow
def test_the_held_out_error_is_that_of_the_definition(decision_file, frames):
    """One worker, dp and sp: the mean over frames of the mean square over an action."""
    losses = []
    for ranks, sp in ((1, 1), (2, 1), (2, 2)):
        folder = decision_file.parent / f"{ranks}-{sp}"
        options = [f"run.dir={folder}", f"parallel.sp={sp}", "evaluate.rollouts=0"]
        run(decision_file, ranks, *options, "train.steps=1", "optim.learning_rate=1e-9")
        losses.append(json.loads((folder / "evaluation.json").read_text())["loss"])
    config = load_config(decision_file, [])
    torch.manual_seed(0)
    model = build_model(config.model)
    reader = SequenceReader(TokenStream(config.data, "held_out"), Layout(48), True)
    batch = reader.micro_batch([0, 48])
    with torch.no_grad():
        actions, _ = model(batch.inputs, reset=batch.reset)
    expected = float((actions - batch.labels).square().mean())
    assert losses == pytest.approx([expected] * 3, rel=1e-5)


class _Counting:
    """Observations count frames, and an action earns its first number."""

    def __init__(self, length: int) -> None:
        self.length, self.at, self.seeds = length, 0, []

    def reset(self, seed):
        self.at = 0
        self.seeds.append(seed)
        return np.zeros(11), {}

    def step(self, action):
        self.at += 1
        return np.full(11, self.at), float(action[0]), self.at == self.length, False, {}

    def close(self):
        pass


class _Noting:
    """A player that notes what it is asked, and does what is wanted of it."""

    def __init__(self):
        self.info, self.asked = about(make_episodes(2)), []

    def act(self, before, to_go, seen):
        self.asked.append((before.copy(), to_go.copy(), seen.copy()))
        return np.full((2, 3), 0.5, np.float32)


def test_what_is_earned_is_taken_off_what_is_asked(monkeypatch):
    """And an episode that has ended earns no more while the other goes on."""
    lengths = iter([2, 4])
    monkeypatch.setattr(rollout, "make_environment", lambda name: _Counting(next(lengths)))
    player = _Noting()
    returns, frames = rollout._play(player, 2, seed=7, asked=10.0)
    assert (returns, frames) == ([1.0, 2.0], [2, 4])
    assert [to_go.tolist() for _, to_go, _ in player.asked] == [
        [10, 10], [9.5, 9.5], [9, 9], [9, 8.5],
    ]  # fmt: skip
    assert [seen[1, 0] for _, _, seen in player.asked] == [0, 1, 2, 3]
    assert not player.asked[0][0].any()
    assert (player.asked[1][0] == 0.5).all()


@pytest.mark.parametrize("frames", [None, 5])
def test_a_player_reads_as_the_model_was_trained(frames):
    """Frames scaled as the data's are: all by the carry, or the last few read anew."""
    info = about(make_episodes(2))
    config = ModelConfig(layers=1, width=16, observation_width=11, action_width=3)
    model = build_model(config).eval()
    player = _Player(model, info, frames, torch.device("cpu"))
    before, to_go, seen = np.zeros((2, 3), np.float32), np.array([3.0, 4.0]), np.ones((2, 11))
    read = []
    for step in range(8):
        scaled = [before, to_go[:, None] / info.return_scale, (seen + step - 0.5) / 2.0]
        read.append(torch.tensor(np.concatenate(scaled, 1), dtype=torch.float32))
        actions = player.act(before, to_go, seen + step)
        window = torch.stack(read if frames is None else read[-frames:], 1)
        with torch.no_grad():
            expected = model(window)[0][:, -1]
        np.testing.assert_allclose(actions, expected.numpy(), atol=1e-6)
        before, to_go = actions, to_go - 0.1


@pytest.mark.slow
def test_a_trained_run_is_played_again(decision_file, capsys):
    """The same by the command as after the training, and told what it is not."""
    run(decision_file, 1)
    folder = decision_file.parent / "run"
    played = json.loads((folder / "evaluation.json").read_text())["rollouts"]
    assert main(["rollout", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"score of {played['score']:.1f} over 2 episodes" in printed
    assert [f"return {each:,.1f}" in printed for each in played["returns"]] == [True, True]
    assert main(["rollout", str(folder), "--frames", "0"]) == 1
    assert main(["generate", str(folder), "--prompt", "a"]) == 1
    assert "decision model" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    assert f"normalised score of {played['score']:.1f}" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_a_finished_run_is_played_more_often(decision_file):
    """Asked for more episodes it makes its result anew, and its record stays whole."""
    folder = decision_file.parent / "run"
    run(decision_file, 1)
    for episodes in (3, 4):
        told = warnings(run(decision_file, 1, f"evaluate.rollouts={episodes}"))
        assert not any("could not be read" in message for message in told)
        played = json.loads((folder / "evaluation.json").read_text())["rollouts"]
        assert len(played["returns"]) == episodes
    assert len((folder / "evaluations.jsonl").read_text().splitlines()) == 1


def test_an_action_at_its_bound_still_learns_in_bf16():
    """Labels of clipped actions push there; a frame of the other sign must come back."""
    hidden = torch.full((1, 1, 4), 2.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.full((3, 4), 0.5, dtype=torch.bfloat16)  # actions of tanh(4)
    summed_squared_error(hidden, weight, -torch.ones(1, 1, 3), 8).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().min() > 1e-4


@pytest.mark.parametrize("on_text", [True, False])
def test_only_a_run_on_frames_is_played(on_text, dataset, tmp_path):
    if on_text:
        shutil.copy(dataset / INFO_NAME, RunFolder(tmp_path).data)
    with pytest.raises(ValueError, match="is not a run on what data_prep"):
        roll_out(tmp_path, 1, torch.device("cpu"))


@pytest.mark.parametrize("asked", [{"asked": float("nan")}, {"frames": 0}, {"episodes": 0}])
def test_what_cannot_be_asked_of_a_player_is_told(asked, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be asked for|not positive"):
        roll_out(tmp_path, **{"episodes": 1, "device": torch.device("cpu")} | asked)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.reset_state=false", "an episode of .* begins anew"),
        ("model.action_width=4", "4 is not the 3 of"),
        ("model.observation_width=4", "4 is not the 11 of"),
        ("evaluate.rollout_frames=0", "evaluate.rollout_frames"),
        ("evaluate.sequences=0", "raise evaluate.sequences"),
    ],
)
def test_a_run_that_does_not_fit_its_frames_is_told(decision_file, override, told):
    with pytest.raises(ConfigError, match=told):
        load_config(decision_file, [override])


def test_a_language_model_does_not_act(config_file):
    with pytest.raises(ConfigError, match="only a decision model acts"):
        load_config(config_file, ["evaluate.rollouts=2"])


def test_frames_that_are_scaled_otherwise_are_refused(decision_file, frames, tmp_path):
    """To be mixed with, or to be evaluated on: their numbers mean something else."""
    other = write_made_up(tmp_path / "other", count=40)
    for override in (f"data.path={{{frames}: 1, {other}: 1}}", f"evaluate.path={other}"):
        with pytest.raises(ConfigError, match="scaled otherwise"):
            load_config(decision_file, [override])


def test_frames_and_text_are_not_mixed(decision_file, frames, dataset):
    with pytest.raises(ConfigError, match="not of one tokenizer"):
        load_config(decision_file, [f"data.path={{{frames}: 1, {dataset}: 1}}"])
