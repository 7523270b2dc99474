"""The verb generate: its options, what it prints, and where it ends."""

import argparse
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainer.generate
from data_prep.tokenizer import ByteTokenizer
from launch.verbs import generate as verb
from models.config import ModelConfig
from models.lm import LanguageModel
from trainer.generate import Sampling, Trained


def printed(text: str, stops: list[str]) -> str:
    stream = ByteTokenizer().decode_stream()
    return "".join(verb.until_stop(stream, list(text.encode()), stops))


@given(
    text=st.text("abé", max_size=40),
    stops=st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
)
def test_text_ends_before_the_first_stop(text, stops):
    """The first that is complete: what would come after it is never drawn."""
    whole = text
    for end in range(len(text) + 1):
        if at := [text[:end].find(stop) for stop in stops if stop in text[:end]]:
            text = text[: min(at)]
            break
    assert printed(whole, stops) == text


def test_a_stop_that_only_begins_is_text():
    assert printed("one END", ["END."]) == "one END"
    assert printed("one END. two", ["END."]) == "one "


def test_bytes_that_no_next_token_completes_are_shown():
    stream = ByteTokenizer().decode_stream()
    assert "".join(verb.until_stop(stream, [65, 0xC3], [])) == "A\ufffd"


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is not a number from 0 on"),
        ({"temperature": float("nan")}, "temperature nan is not"),
        ({"temperature": float("inf")}, "temperature inf is not"),
        ({"top_k": -1}, "top-k -1 is negative"),
        ({"top_p": 0.0}, "top-p 0.0 is not above 0"),
        ({"top_p": 1.5}, "top-p 1.5 is not above 0"),
        ({"seed": -1}, "seed -1 is not from 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(chosen, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**chosen)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verb.arguments(parser)
    return verb.run(parser.parse_args(arguments))


def test_faults_of_the_command_come_before_any_model(tmp_path):
    with pytest.raises(ValueError, match="--max-tokens 0 is not positive"):
        run("nowhere", "--prompt", "a", "--max-tokens", "0")
    with pytest.raises(ValueError, match="--stop is empty"):
        run("nowhere", "--prompt", "a", "--stop", "")
    (tmp_path / "latin").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ValueError, match="latin:2: byte 0xe9 is not UTF-8"):
        run("nowhere", "--prompt-file", str(tmp_path / "latin"))


def test_it_ends_with_the_document_and_draws_as_it_was_asked(monkeypatch, capsys):
    """What was typed arrives, in its place; behind the end of a document nothing is written."""
    asked: list[tuple[list[int], int, Sampling]] = []
    known = torch.ones(256, dtype=torch.bool)
    trained = Trained(LanguageModel(ModelConfig(layers=1)), ByteTokenizer(), 7, known, ord("."))

    def drawn(model, tokens, count, sampling, on_read):
        asked.append((list(tokens), count, sampling))
        yield from b"one two. three"

    monkeypatch.setattr(trainer.generate, "load_run", lambda folder, device: trained)
    monkeypatch.setattr(trainer.generate, "generate", drawn)
    options = "--max-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.25 --seed 11"
    assert run("somewhere", "--prompt", "ab", *options.split()) == 0
    assert capsys.readouterr().out == "one two\n"
    ((tokens, count, sampling),) = asked
    assert (tokens, count) == ([97, 98], 9)
    assert sampling.known is known
    assert replace(sampling, known=None) == Sampling(0.5, 3, 0.25, 11)
    assert run("somewhere", "--prompt", "ab", "--stop", "tw", "--stop", "thr") == 0
    assert capsys.readouterr().out == "one \n"


def test_a_prompt_is_read_unchanged(tmp_path, monkeypatch):
    data = b"\xef\xbb\xbfone\r\ntwo\r"
    (tmp_path / "prompt").write_bytes(data)
    assert "".join(verb._pieces(str(tmp_path / "prompt"))).encode() == data
    with (tmp_path / "prompt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "".join(verb._pieces("-")).encode() == data


def test_a_long_prompt_is_cut_behind_lines_and_never_in_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "PIECE_BYTES", 7)
    for text in ("one\ntwo\nthree\nfour", "carré é€😀 " * 9, "\n" * 30, "a"):
        (tmp_path / "prompt").write_text(text)
        pieces = list(verb._pieces(str(tmp_path / "prompt")))
        assert "".join(pieces) == text
        assert max(len(piece.encode()) for piece in pieces) <= 14
    (tmp_path / "prompt").write_text("one\ntwo\nthree\nfour")
    assert list(verb._pieces(str(tmp_path / "prompt"))) == ["one\n", "two\nthree\n", "four"]
    (tmp_path / "prompt").write_bytes(b"one\ntwo\nthree\nf\xffour, and more")
    with pytest.raises(ValueError, match="prompt:4: byte 0xff is not UTF-8"):
        list(verb._pieces(str(tmp_path / "prompt")))


def test_a_long_prompt_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(verb, "LONG_PROMPT_SECONDS", 0.0)
    with verb._Reading() as reading:
        reading.show(4096)
        assert "reading the prompt: 4,096 tokens" in capsys.readouterr().err
    assert capsys.readouterr().err.endswith("\r")
