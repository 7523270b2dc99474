"""Which tokens a (rank, segment) holds: all of a sequence, each once, in order."""

from itertools import product

import pytest

from trainer.layout import Layout, Plan, even_segments


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


READS = [
    (Plan(1), [0]),
    (Plan(4), [0, 1, 2, 3, 2, 1, 0]),
    (Plan(4, keep=3), [0, 1, 2, 3, 0]),
    (Plan(4, keep=4), [0, 1, 2, 3]),
    (Plan(4, truncate=True), [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("plan", "reads"), READS)
def test_the_way_back_is_three_times_the_way_there(plan, reads):
    """In forwards; of kept segments the backward alone is left, at the turn."""
    work = [plan.work(n) for n in range(len(reads) + 1)]
    kept = plan.segments if plan.truncate else plan.keep
    assert work[0] == 0
    assert work[-1] == 3 * plan.segments + (plan.segments - min(kept, plan.segments))
    assert work == sorted(work)
    if plan == Plan(4):
        assert work == [0, 1, 2, 3, 6, 9, 12, 15]


@pytest.mark.parametrize(
    ("plan", "reads"),
    READS,
)
def test_segments_are_read_there_and_back(plan, reads):
    assert plan.reads == reads


def test_even_segments_are_no_longer_than_they_may_be():
    for tokens, most, ranks in product((6, 96, 1000, 70_000), (1, 7, 32, 99_999), (1, 2, 3)):
        seq_len = tokens * ranks
        segment_len = even_segments(seq_len, most, ranks)
        layout = Layout(seq_len, ranks, 0, segment_len)
        assert layout.shard_tokens <= most
        assert all(len(layout.segment(n)) % ranks == 0 for n in range(layout.segments))
        assert (segment_len is None) == (seq_len <= most * ranks)
