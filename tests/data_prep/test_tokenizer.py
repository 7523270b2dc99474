"""Tokens decode to the text they are of, or the difference is told and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data_prep import write
from data_prep.schema import TOKENIZER_NAME, load_info
from data_prep.sources import Selection, plan
from data_prep.tokenize import Work, _tokenize, tokenize
from data_prep.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from data_prep.write import Settings, prepare

CORPUS = ["The scan carries é states over many shards; ünï, and so on.\n" * 20]


def byte_level(**options: object) -> Tokenizer:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama() -> Tokenizer:
    """As Llama's: spaces are characters, and unknown ones fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())
    # bytes are tokens of the model alone, as in Llama's file
    saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(saved))


def with_state() -> Tokenizer:
    """All that a file may carry along from its last use."""
    tokenizer = byte_level(dropout=0.5)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        special_tokens=[("<|endoftext|>", end)],
    )
    return tokenizer


KINDS = {"byte level": byte_level, "llama": llama, "with state": with_state}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, JsonTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, make in KINDS.items():
        make().save(str(folder / f"{name}.json"))
    return {name: JsonTokenizer(folder / f"{name}.json") for name in KINDS}


@given(text=st.text(max_size=300))
@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(kind, text, tokenizers):
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.tolist()) == text
    stream = tokenizer.decode_stream()
    assert "".join(map(stream.step, tokens.tolist())) + stream.end() == text
    for cut in (1, len(tokens) // 2):  # behind others, whose text is out
        begun, rest = tokens.tolist()[:cut], tokens.tolist()[cut:]
        stream = tokenizer.decode_stream(begun)
        written = tokenizer.decode(begun) + "".join(map(stream.step, rest)) + stream.end()
        assert written == text or "\ufffd" in tokenizer.decode(begun)
    lengths = tokenizer.token_bytes()[tokens]
    prefix = len(tokens) > 0 and kind == "llama"  # a space before the text, which is not of it
    assert lengths.sum() - prefix == len(text.encode())


@given(tokens=st.lists(st.integers(0, 319), max_size=60))
@pytest.mark.parametrize("kind", ["byte level", "llama", "bytes"])
def test_whatever_a_model_draws_is_printed_to_its_end(kind, tokens, tokenizers):
    """The same as at once, but for the places where bytes make no character."""
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizers[kind]
    tokens = [token for token in tokens if token < tokenizer.vocab_size]
    stream = tokenizer.decode_stream()
    streamed = "".join(map(stream.step, tokens)) + stream.end()
    at_once = tokenizer.decode(tokens)
    assert streamed.replace("\ufffd", "") == at_once.replace("\ufffd", "") or "\ufffd" in at_once


def test_what_stands_in_the_text_is_text(tokenizers):
    """Special tokens are not found in it, state of the file does not shorten or fill it."""
    tokenizer = tokenizers["with state"]
    text = "<|endoftext|> and <|endoftext|> " * 10
    tokens = tokenizer.encode(text).tolist()
    assert tokenizer.token_id("<|endoftext|>") not in tokens
    assert tokenizer.decode(tokens) == text
    assert tokens == tokenizer.encode(text).tolist()  # no dropout


def prepared(tokenizer: Tokenizer, folder: Path, text: str, **chosen: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "a.txt").write_text(text)
    settings = Settings(str(folder / "tokenizer.json"), 0.0, 64, **chosen)
    prepare(Selection((str(folder / "a.txt"),)), folder / "out", settings, 1, tell=None)
    return folder / "out"


def lossy() -> Tokenizer:
    """Lower case, and what it does not know becomes nothing."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_a_tokenizer_that_changes_the_text_is_refused_unless_allowed(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt, character 4: 'the SCAN' becomes 'the scan'"):
        prepared(lossy(), tmp_path, "the SCAN")
    assert not (tmp_path / "out").exists()
    out = prepared(lossy(), tmp_path, "the SCAN", allow_changes=True)
    assert load_info(out).changed_texts == 1


def test_many_changes_are_counted_and_one_is_told(tmp_path):
    """Of a corpus of millions nobody reads more, and memory has no room for all."""
    lossy().save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "SCAN"}\n' * 50)
    settings = Settings(str(tmp_path / "t.json"), 0.0, 64, allow_changes=True)
    selection, told = Selection((str(tmp_path / "a.jsonl"),)), []
    info = prepare(selection, tmp_path / "out", settings, 1, tell=told.append)
    assert info.changed_texts == 50
    assert any(line.startswith("the tokenizer changes 50 texts; the first: ") for line in told)
    (piece,) = plan(selection, None, [])
    fingerprint = load_tokenizer(settings.tokenizer).fingerprint
    work = Work(piece, tmp_path / "a.npz", settings.tokenizer, fingerprint, "text", "uint16", None)
    assert len(_tokenize(work, 0, changes=True).changed) == 1
    # and what has too many faults is not read to its end
    wrong = work._replace(field="other")
    assert _tokenize(wrong, 3, changes=True).lost == 4


def test_a_tokenizer_that_changes_meanwhile_is_told(tmp_path, monkeypatch):
    byte_level().save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("the scan " * 50)

    def tokenized(*given: Any, **options: Any) -> None:
        tokenize(*given, **options)
        lossy().save(str(tmp_path / "t.json"))

    monkeypatch.setattr(write, "tokenize", tokenized)
    settings, selection = Settings(str(tmp_path / "t.json"), 0.0, 64), (str(tmp_path / "a.txt"),)
    with pytest.raises(ValueError, match=r"t\.json changed meanwhile"):
        prepare(Selection(selection), tmp_path / "out", settings, 1, tell=None)
    assert not (tmp_path / "out").exists()
    # of bytes there is no tokenizer, whatever an interrupted command has left
    assert (tmp_path / "out.partial" / TOKENIZER_NAME).exists()
    monkeypatch.setattr(write, "tokenize", tokenize)
    prepare(Selection(selection), tmp_path / "out", Settings("bytes", 0.0, 64), 1, tell=None)
    assert not (tmp_path / "out" / TOKENIZER_NAME).exists()


def test_characters_that_are_dropped_are_seen(tmp_path):
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokenizer.train_from_iterator(["abc abc"], trainer)
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        prepared(tokenizer, tmp_path, "abczabc")


def test_a_folder_is_a_tokenizer_and_others_are_refused(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab_size == byte_level().get_vocab_size()
    for text in ("{}", "[]", "no json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json' (cannot be read|has no tokens)"):
            load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_documents_may_end_with_a_token(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    selection = Selection((str(tmp_path / "a.jsonl"),))
    chosen = Settings(held_out=0.0, block_size=9, end_of_document="new")
    info = prepare(selection, tmp_path / "out", chosen, 1, tell=None)
    assert (info.vocab_size, info.end_of_document, info.dtype) == (257, 256, "uint16")
    from data_prep.blocks import Blocks

    tokens, starts = Blocks(str(tmp_path / "out"), "train").read(0)
    assert tokens.tolist() == [*b"one", 256, *b"two", 256, 0]
    assert starts.tolist() == [0, 4]  # the empty one has no tokens
    with pytest.raises(ValueError, match="is not a token of bytes"):
        prepare(selection, tmp_path / "o", Settings(end_of_document="</s>"), 1, tell=None)


def test_a_text_that_becomes_the_end_of_a_document_is_refused(tmp_path):
    """By a model that has the token among its own, where no special token is looked for."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "[UNK]": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="becomes the token that ends documents"):
        prepared(tokenizer, tmp_path, "a </s> b", end_of_document="</s>")


def test_a_tokenizer_that_puts_a_space_before_every_piece_is_seen(tmp_path, monkeypatch):
    """A document in pieces: each decodes to itself, and all together do not."""
    from data_prep.sources import pieces

    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    text = "The scan carries\n" * 20
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        prepared(llama(), tmp_path, text)
    (tmp_path / "other").mkdir()
    prepared(byte_level(), tmp_path / "other", text)
