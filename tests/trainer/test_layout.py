"""Which tokens a (rank, segment) holds: all of a sequence, each once, in order."""

import pytest

from trainer.layout import Layout, Plan


@pytest.mark.parametrize("segments", [1, 2, 6])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_all_segments_make_the_sequence(ranks, segments):
    tokens = []
    for segment in range(segments):
        for rank in range(ranks):
            tokens += Layout(96, ranks, rank, 96 // segments).held(segment)
    assert tokens == list(range(96))


def test_a_shard_by_hand():
    layout = Layout(88, sp_size=4, sp_rank=2, segment_len=32)
    assert (layout.segments, layout.shard_tokens) == (3, 8)
    assert layout.held() == range(16, 24)
    assert layout.held(2) == range(76, 82)  # the last is shorter


@pytest.mark.parametrize(
    ("plan", "reads"),
    [
        (Plan(1), [0]),
        (Plan(4), [0, 1, 2, 3, 2, 1, 0]),
        (Plan(4, keep=3), [0, 1, 2, 3, 0]),
        (Plan(4, keep=4), [0, 1, 2, 3]),
        (Plan(4, truncate=True), [0, 1, 2, 3]),
    ],
)
def test_segments_are_read_there_and_back(plan, reads):
    assert plan.reads == reads
