"""Which workers go where: evenly, sequences inside machines, fewer where there is less room."""

import pytest

from launch.placement import Plan, plan, shown
from trainer.config import Config


def _config(workers: int, sp: int, least: int | None = None, seq_len: int = 4096) -> Config:
    config = Config()
    config.launch.workers, config.launch.min_workers = workers, least
    config.parallel.sp = sp
    config.train.batch_size, config.train.seq_len = (8, 12)[seq_len % 3 == 0], seq_len
    return config


@pytest.mark.parametrize(
    ("workers", "sp", "rooms", "expected"),
    [
        (4, 2, {"a": 4, "b": 4}, "aaaa"),  # one machine where one will do
        (4, 2, {"a": 2, "b": 2}, "aabb"),
        (4, 4, {"a": 1, "b": 1, "c": 1, "d": 1}, "abcd"),
        (4, 2, {"a": 1, "b": 5}, "bbbb"),
        (4, 2, {"a": 3, "b": 2}, "aabb"),
        (4, 4, {"a": 3, "b": 3, "c": 1}, "aabb"),
        # three on each would cut a sequence of two: two on each of three does not
        (6, 2, {"a": 3, "b": 3, "c": 2}, "aabbcc"),
        (6, 3, {"a": 3, "b": 3, "c": 2}, "aaabbb"),
    ],
)
def test_equally_many_on_as_few_machines_as_will_do(workers, sp, rooms, expected):
    planned = plan(_config(workers, sp, seq_len=4608), rooms)
    assert planned is not None
    assert planned.nodes == tuple(expected)
    assert planned.sp == sp


@pytest.mark.parametrize("rooms", [{}, {"a": 3}, {"a": 3, "b": 1}])
def test_too_little_or_uneven_room_is_none(rooms):
    assert plan(_config(4, 2), rooms) is None


@pytest.mark.parametrize(
    ("least", "rooms", "workers", "sp"),
    [
        (1, {"a": 4}, 4, 2),
        (1, {"a": 3}, 2, 2),  # three divide neither the batch of 8 nor a sequence
        (1, {"a": 2, "b": 1}, 2, 2),
        (1, {"a": 1}, 1, 1),  # the sequence is whole again
        (2, {"a": 1, "b": 1}, 2, 2),
    ],
)
def test_fewer_workers_get_a_layout_of_their_own(least, rooms, workers, sp):
    config = _config(4, 2, least)
    planned = plan(config, rooms)
    assert planned is not None
    assert (planned.workers, planned.sp) == (workers, sp)
    applied = planned.applied(config)
    assert (applied.launch.workers, applied.parallel.sp) == (workers, sp)
    assert applied.train == config.train  # the same batch, the same order of its data
    assert config.launch.workers == 4


@pytest.mark.parametrize(
    ("key", "value"), [("segment_len", 4096), ("curriculum", [256]), ("segment_len", 6144)]
)
def test_fewer_workers_lose_no_token_of_a_segment(key, value):
    """Three divide the sequence, but no segment of 4,096 tokens, nor 256 before it."""
    config = _config(4, 4, 2, seq_len=12_288)
    config.train.batch_size, config.model.conv_width = 1, 4
    assert plan(config, {"a": 3}) == Plan(3, ("a",) * 3)
    setattr(config.train, key, value)
    config.train.curriculum_steps = 10
    planned = plan(config, {"a": 3})
    assert planned
    assert planned.sp == (3 if value == 6144 else 2)


def test_what_is_configured_is_not_judged_anew():
    """A comparison's file says lengths of its own: what stands beside them fits no sequence."""
    config = _config(4, 4)
    config.train.segment_len = 2 * config.train.seq_len
    assert plan(config, {"a": 4}) == Plan(4, ("a",) * 4)


def test_not_below_the_least():
    assert plan(_config(4, 2, 2), {"a": 1}) is None


def test_room_is_shown_by_machine():
    assert shown({"b" * 40: 2, "a" * 40: 1}) == "1 on aaaaaaaa, 2 on bbbbbbbb"
    assert shown({}) == "no machine answers"
