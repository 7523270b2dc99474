"""A rank reads its own shard and no more, in an order that no number of workers changes."""

import os

import numpy as np
import pytest
import torch

from data_prep.blocks import DataError
from data_prep.schema import load_info
from trainer.config import DataConfig, load_config
from trainer.data import SequenceReader, TokenStream, training_batches
from trainer.layout import Layout
from trainer.order import Position, SourceOrder, Span

SEQ_LEN = 960


@pytest.fixture
def data(dataset):
    return DataConfig(path=str(dataset))


def test_shards_of_any_sp_make_the_same_sequence(data):
    """Data written once, read at any sp: tokens, labels and resets are the whole's, cut."""
    whole = SequenceReader(TokenStream(data, "train"), Layout(SEQ_LEN), with_reset=True)
    begins = [3 * SEQ_LEN, 17]
    expected = whole.micro_batch(begins)
    assert expected.reset is not None
    assert expected.reset.sum() > 0
    assert torch.equal(expected.inputs[:, 1:], expected.labels[:, :-1])
    for shards in (2, 3, 5):
        parts = [
            SequenceReader(
                TokenStream(data, "train"), Layout(SEQ_LEN, shards, s), True
            ).micro_batch(begins)
            for s in range(shards)
        ]
        for name in ("inputs", "labels", "reset"):
            joined = torch.cat([getattr(part, name) for part in parts], dim=1)
            assert torch.equal(joined, getattr(expected, name))


def test_segments_and_shards_make_the_same_sequence(data):
    """A sequence in three segments, each over two ranks: the whole's tokens, labels and resets."""
    begins = [3 * SEQ_LEN, 17]
    whole = SequenceReader(TokenStream(data, "train"), Layout(SEQ_LEN), with_reset=True)
    expected = whole.micro_batch(begins)
    parts = [
        SequenceReader(
            TokenStream(data, "train"), Layout(SEQ_LEN, 2, rank, SEQ_LEN // 3), True
        ).micro_batch(begins, segment)
        for segment in range(3)
        for rank in range(2)
    ]
    for name in ("inputs", "labels", "reset"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(expected, name))


def test_a_rank_touches_only_the_blocks_of_its_shard(data, dataset):
    """Counted in bytes: the blocks that hold tokens [begin, begin + T + 1), and no others."""
    info = load_info(dataset)
    block_bytes = info.block_size + 4 + 4  # uint8 tokens, crc32, the length of the starts
    for shards in (1, 4):
        for shard in range(shards):
            stream = TokenStream(data, "train")
            reader = SequenceReader(stream, Layout(SEQ_LEN, shards, shard), with_reset=False)
            reader.micro_batch([2 * SEQ_LEN])
            begin = 2 * SEQ_LEN + shard * SEQ_LEN // shards
            end = begin + SEQ_LEN // shards + 1
            blocks = (end - 1) // info.block_size - begin // info.block_size + 1
            assert (
                0 <= stream.sources[0].bytes_read - blocks * block_bytes <= 4 * 4
            )  # a few document starts


def test_reset_marks_the_first_token_of_each_document(data, dataset):
    """Counted over the whole split: as many marks as documents, each before its own first word."""
    info = load_info(dataset)
    stream = TokenStream(data, "train")
    tokens, starts = stream.read(0, stream.tokens[0])
    assert len(starts) == info.splits["train"].documents
    assert starts[0] == 0
    newline = ord("\n")  # every document of the fixture ends with its only one
    assert np.array_equal(starts[1:], np.flatnonzero(tokens == newline)[:-1] + 1)


def test_every_epoch_is_a_permutation_of_its_own():
    def order(seed):
        return SourceOrder(Span(0, 7), 10, seed)

    first = order(3)
    epochs = [[first[n] for n in range(e * 7, e * 7 + 7)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 70, 10))
    assert epochs[0] != epochs[1]
    assert [order(3)[n] for n in range(14, 21)] == epochs[2]
    assert [order(4)[n] for n in range(7)] != epochs[0]
    position = Position(consumed=17, sequences=7)
    assert (position.epoch, position.consumed_in_epoch) == (2, 3)


def test_a_shifted_epoch_begins_at_a_place_of_its_own(data):
    """Every place is one of seq_len, and the last sequence's last label is there at all of them."""
    stream = TokenStream(data, "train")
    reader = SequenceReader(stream, Layout(SEQ_LEN), False, shift=True)
    count = reader.spans[0].sequences
    order = reader.order(seed=3, shift=True)
    firsts = []
    for epoch in range(200):
        begins = sorted(order[epoch * count + n] for n in range(count))
        assert np.diff(begins).tolist() == [SEQ_LEN] * (count - 1)
        assert 0 <= begins[0] < SEQ_LEN
        firsts.append(begins[0])
    assert len(set(firsts)) > 150
    assert stream.tokens[0] - (SEQ_LEN - 1 + count * SEQ_LEN) in range(1, SEQ_LEN + 1)
    again = reader.order(seed=3, shift=True)
    assert again[5 * count + 1] == order[5 * count + 1]


def test_a_run_reads_at_shifted_places_where_it_is_asked_to(config_file):
    begins = []
    for shift in (True, False):
        config = load_config(config_file, [f"data.shift={shift}"])
        reader = SequenceReader(TokenStream(config.data, "train"), Layout(192), False, shift)
        batches = training_batches(reader, config, 0, 0)
        begins.append(next(batches).begins)
        batches.close()
        order = reader.order(config.run.seed, shift)
        assert begins[-1] == [order[0], order[1]]
    assert begins[0] != begins[1]


def test_a_step_holds_the_same_sequences_whatever_dp(config_file):
    """Two DP ranks together read, in each step, what one alone reads."""

    def steps(workers: int, dp_rank: int, consumed: int) -> list[list[list[int]]]:
        config = load_config(config_file, ["train.batch_size=4"], workers=workers)
        reader = SequenceReader(TokenStream(config.data, "train"), Layout(192), False)
        batches = training_batches(reader, config, dp_rank, consumed)
        return [[next(b).inputs[0].tolist() for b in next(batches).micro_batches] for _ in range(3)]

    alone = steps(1, 0, 0)
    first, second = steps(2, 0, 0), steps(2, 1, 0)
    for whole, a, b in zip(alone, first, second, strict=True):
        assert sorted(whole) == sorted(a + b)
    assert steps(1, 0, 4)[0] == alone[1]


def test_shards_of_a_url_are_fetched_once_and_read_alike(dataset, tmp_path):
    """Streaming fetches index and shards into the cache; the tokens are the same."""
    local = TokenStream(DataConfig(path=str(dataset)), "held_out")
    config = DataConfig(path=f"file://{dataset}", cache=str(tmp_path / "cache"))
    remote = TokenStream(config, "held_out")
    assert not list((tmp_path / "cache").rglob("*.mds"))
    assert np.array_equal(remote.read(0, 500)[0], local.read(0, 500)[0])
    (shard,) = (tmp_path / "cache").rglob("*.mds")
    damaged = shard.read_bytes()[:-100] + bytes(100)
    shard.write_bytes(damaged)  # as a machine that died leaves it
    assert np.array_equal(TokenStream(config, "held_out").read(0, 9)[0], local.read(0, 9)[0])
    # damaged though it looks as when it was looked at: told, and looked at anew by the next start
    before, changed = shard.stat(), bytearray(shard.read_bytes())
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    whole = 0, local.tokens[0]
    with pytest.raises(DataError, match="its checksum is wrong"):
        TokenStream(config, "held_out").read(*whole)
    again = TokenStream(config, "held_out").read(*whole)[0]
    assert np.array_equal(again, local.read(*whole)[0])
