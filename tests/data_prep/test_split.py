"""The share that is held out is the share that was asked for, by tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.parts import Table, document_key
from data_prep.sources import Selection
from data_prep.split import FEW, SHORT, choose, held_tokens
from data_prep.write import Settings, prepare
from tests.data_prep.test_data_prep import tokens_of


def table(lengths: list[int], decided: int = -1) -> Table:
    """Documents of so many tokens, a byte each."""
    rows = [(n, n, True, document_key(f"d{i}"), decided) for i, n in enumerate(lengths)]
    return Table.of(rows)


def shares(lengths: list[int], share: float) -> tuple[float, int]:
    """(share of the tokens, documents) held out."""
    documents = table(lengths)
    held = held_tokens(documents, choose(documents, share))
    assert np.all((held >= 0) & (held <= documents.lengths))
    return float(held.sum()) / sum(lengths), int(np.count_nonzero(held))


@given(
    lengths=st.lists(st.integers(1, 100_000), min_size=1, max_size=400),
    share=st.sampled_from([0.01, 0.05, 0.2, 0.5]),
)
def test_the_share_is_the_one_asked_for(lengths, share):
    got, documents = shares(lengths, share)
    assert got < 1  # something is left to train on
    if sum(lengths) * share > 50 * FEW:
        assert share * (1 - 2 * SHORT) <= got <= share + 1e-4
    if len(lengths) > 1:
        assert documents >= 1


@pytest.mark.parametrize("lengths", [[1_000_000], [1_000_000] * 2, [1000] * 320, [5, 10**7]])
def test_few_or_large_documents_too(lengths):
    got, _ = shares(lengths, 0.05)
    assert got == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("count", [10, 20, 60])
@pytest.mark.parametrize("seed", range(20))
def test_short_documents_are_held_out_whole(count, seed):
    lengths = np.random.default_rng(seed).integers(10, 30, count).tolist()
    documents = table(lengths)
    split = choose(documents, 0.05)
    assert split.cut == -1
    assert split.held_out.sum() >= 1


def test_documents_added_move_few_others():
    lengths = np.random.default_rng(0).integers(100, 300, 1000).tolist()
    before = choose(table(lengths), 0.1).held_out
    after = choose(table([*lengths, 200, 200]), 0.1).held_out[:1000]
    assert np.count_nonzero(before != after) <= 3


def test_a_source_of_its_own_is_held_out_and_nothing_else(tmp_path):
    (tmp_path / "train.txt").write_text("train " * 100)
    (tmp_path / "valid.txt").write_text("valid " * 10)
    selection = Selection((str(tmp_path / "train.txt"),), (str(tmp_path / "valid.txt"),))
    prepare(selection, tmp_path / "out", Settings(block_size=64), 1, tell=None)
    assert tokens_of(tmp_path / "out", "train") == b"train " * 100
    assert tokens_of(tmp_path / "out", "held_out") == b"valid " * 10


def test_one_line_is_cut_too_and_its_bytes_are_counted(tmp_path):
    (tmp_path / "text8").write_text("é" * 20_000)
    info = prepare(
        Selection((str(tmp_path / "text8"),)),
        tmp_path / "out",
        Settings(block_size=64),
        1,
        tell=None,
    )
    assert info.splits["held_out"].tokens == 2000
    assert info.splits["train"].documents == info.splits["held_out"].documents == 1
    joined = tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "held_out")
    assert joined.decode() == "é" * 20_000
