"""Which tokens a (rank, segment) holds: all of a sequence, each once, in order."""

import pytest

from trainer.layout import Layout


@pytest.mark.parametrize("segments", [1, 2, 6])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_all_segments_make_the_sequence(ranks, segments):
    tokens = []
    for segment in range(segments):
        for rank in range(ranks):
            tokens += Layout(96, ranks, rank, segments).held(segment)
    assert tokens == list(range(96))


def test_a_shard_by_hand():
    layout = Layout(96, sp_size=4, sp_rank=2, segments=3)
    assert (layout.segment_tokens, layout.shard_tokens) == (32, 8)
    assert layout.held() == range(16, 24)
    assert layout.held(2) == range(80, 88)
