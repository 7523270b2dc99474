"""Every kind of file gives the texts that are in it, or says what is wrong, and with which line."""

import csv
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.blocks import Blocks
from data_prep.sources import Faulty, File, Selection, Text, jsonl, pieces, plan, read
from data_prep.write import Settings, prepare
from tests.data_prep.test_data_prep import tokens_of

TEXTS = ["first\nsecond", "", "ünï «»\u2028\u0085", '"quoted", {"a": 1}', "x" * 3000, "\ufeffmark"]


def texts_of(selection: Selection, out: Path | None = None) -> list[str]:
    """Documents in order; faults raise."""
    documents: list[str] = []
    for piece in plan(selection, out, []):
        for record in read(piece, selection.field):
            assert isinstance(record, Text), record
            if record.starts:
                documents.append("")
            documents[-1] += record.text
    return documents


def faults_of(selection: Selection) -> list[Faulty]:
    found = plan(selection, None, [])
    records = [record for piece in found for record in read(piece, selection.field)]
    return [record for record in records if isinstance(record, Faulty)]


def write(kind: str, folder: Path, texts: list[str]) -> Path:
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    path = folder / f"file.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "json lines":
        path = folder / "lines.json"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path = folder / "file.parquet"
        pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "csv", "parquet"])
def test_records_hold_what_was_written(kind, tmp_path):
    path = write(kind, tmp_path, TEXTS)
    assert texts_of(Selection((str(path),))) == TEXTS


@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=5))
@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "csv"])
def test_any_text_arrives(kind, texts, tmp_path_factory):
    if kind == "csv":  # whose lines end in \r\n: a lone \r is one for its reader
        texts = [text.replace("\r", "").replace("\0", "") for text in texts]
    path = write(kind, tmp_path_factory.mktemp("any"), texts)
    assert texts_of(Selection((str(path),))) == texts


def test_nested_and_binary_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"doc": {"text": "in"}}\n')
    assert texts_of(Selection((str(tmp_path / "a.jsonl"),), field="doc.text")) == ["in"]
    pq.write_table(
        pa.table({"doc": [{"text": "in"}], "raw": [b"b\xc3\xa9"]}), tmp_path / "a.parquet"
    )
    selection = Selection((str(tmp_path / "a.parquet"),), field="doc.text")
    assert texts_of(selection) == ["in"]
    assert texts_of(Selection((str(tmp_path / "a.parquet"),), field="raw")) == ["bé"]
    (fault,) = faults_of(Selection((str(tmp_path / "a.jsonl"),), field="doc.body"))
    assert "a.jsonl:1: no field 'body' in 'doc' (it has: text)" in fault.message


# What is wrong with the second of three records, and what its message must hold.
FAULTY = {
    "twice": (
        "a.jsonl",
        b'{"text":"a"}\n{"text":"b","text":"x"}\n{"text":"c"}',
        "a.jsonl:2: the field",
    ),
    "twice in an array": (
        "a.json",
        b'[{"text":"a"},{"text":"b","text":"x"},{"text":"c"}]',
        "a.json:1: the field",
    ),
    "torn": ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', "a.jsonl:2: not JSON"),
    "digits": (
        "a.jsonl",
        b'{"text": "a"}\n{"n": %b}\n{"text": "c"}\n' % (b"1" * 5000),
        "a.jsonl:2",
    ),
    "deep": (
        "a.jsonl",
        b'{"text":"a"}\n%b\n{"text":"c"}\n' % (b"[" * 100_000),
        "nested too deeply",
    ),
    "surrogate": ("a.jsonl", b'{"text":"a"}\n{"text":"\\ud800"}\n{"text":"c"}', "not Unicode text"),
    "latin": ("a.jsonl", b'{"text":"a"}\n{"text":"\xe9"}\n{"text":"c"}', "a.jsonl:2: byte 0xe9"),
    "field": (
        "a.json",
        b'[{"text":"a"},\n{"body":"b"},\n{"text":"c"}]',
        "a.json:2: no field 'text'",
    ),
    "number": ("a.json", b'[{"text":"a"},\n{"text":5},\n{"text":"c"}]', "is not a text but int"),
    "columns": ("a.csv", b"text,id\na,1\nb\nc,3\n", "a.csv:3: row 2 has 1 values, the header 2"),
    "csv bytes": ("a.csv", b"text,id\na,1\n\xe9,2\nc,3\n", "row 2: column 'text' is not UTF-8"),
}


@pytest.mark.parametrize(("name", "data", "said"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_record_is_named_and_need_not_stop_a_corpus(name, data, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    (fault,) = faults_of(Selection((str(path),)))
    assert said in fault.message
    out = tmp_path / "out"
    base = {"held_out": 0.0, "block_size": 8}
    with pytest.raises(ValueError, match="--skip-faulty N leaves out"):
        prepare(Selection((str(path),)), out, Settings(**base), 1, tell=None)
    told: list[str] = []
    chosen = Settings(**base, skip_faulty=1)
    info = prepare(Selection((str(path),)), out, chosen, 1, tell=told.append)
    assert tokens_of(out, "train") == b"ac"
    assert info.left_out == [fault.message]
    assert any("left out 1 faulty record" in line for line in told)


def test_an_array_that_ends_too_soon_is_told(tmp_path):
    for text, why in {"[1": "no end", '[{"text":"a"}] x': "something after", "[": "no end"}.items():
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            faults_of(Selection((str(tmp_path / "a.json"),)))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b'text,id\na,1\n"b"x,2\nc,3\n', "a.csv:3: row 2 is not CSV"),
        ("a.csv", b'text,id\na,1\n"b,2\nc,3\n', "a.csv:4: row 2 is not CSV"),
        ("a.json", b'[{"text":"a"},\n{"text":},\n{"text":"c"}]', "a.json:2: not JSON"),
        ("a.json", b'[{"text":"a"},\n{"text":"\xe9"},\n{"text":"c"}]', "a.json:2: byte 0xe9"),
    ],
)
def test_what_breaks_a_file_is_not_one_faulty_record(name, data, said, tmp_path):
    """All that follows would be left out with it, and nobody told."""
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        prepare(Selection((str(path),)), tmp_path / "out", Settings(skip_faulty=9), 1, tell=None)


@pytest.mark.parametrize("broken", [b'{"text": "cut', b'{\n "text": "\xe9"\n}\n'])
def test_of_files_with_a_record_each_a_broken_one_is_one(broken, tmp_path):
    (tmp_path / "a.json").write_text('{"text": "good"}')
    (tmp_path / "b.json").write_bytes(broken)
    (fault,) = faults_of(Selection((str(tmp_path),)))
    assert "b.json" in fault.message
    assert "nobody can tell" not in fault.message
    chosen = Settings(held_out=0.0, block_size=8, skip_faulty=1)
    prepare(Selection((str(tmp_path),)), tmp_path / "out", chosen, 1, tell=None)
    assert tokens_of(tmp_path / "out", "train") == b"good"


def test_no_content_is_taken_for_another_kind(tmp_path):
    """Text by any name is read; JSON, packed or binary files without their names are refused."""
    (tmp_path / "wiki.train.tokens").write_text("plain [text] {as} it is\n")
    assert len(texts_of(Selection((str(tmp_path / "wiki.train.tokens"),)))) == 1
    looks = {
        "records.data": (b'{"text": "a"}\n{"text": "b"}\n', "JSON"),
        "array": (b"[1, 2]\n", "JSON"),
        "packed": (gzip.compress(b"text"), "gzip"),
        "image.png": (b"\x89PNG\r\n\0\0", "it holds zeros"),
        "table": (b"PAR1....", "parquet"),
    }
    for name, (data, said) in looks.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} has no suffix .* looks like .*{said}"):
            plan(Selection((str(tmp_path / name),)), None, [])
    selection = Selection((str(tmp_path / "records.data"),), kind="jsonl")
    assert texts_of(selection) == ["a", "b"]


def test_a_byte_order_mark_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext\n" * 2)
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbftext\nfirst\nsecond\n")
    told: list[str] = []
    chosen = Settings(block_size=8, held_out=0.0)
    prepare(Selection((str(tmp_path),)), tmp_path / "out", chosen, 1, tell=told.append)
    assert tokens_of(tmp_path / "out", "train") == b"text\n\xef\xbb\xbftext\nrowfirstsecond"
    assert "left out the byte-order marks at the beginning of 3 files" in told
    (tmp_path / "c.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(ValueError, match="begins as UTF-16 does"):
        prepare(Selection((str(tmp_path / "c.txt"),)), tmp_path / "o", chosen, 1, tell=None)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_long_document_keeps_its_ends_where_a_part_is_faulty(tmp_path, monkeypatch, bad):
    """Three pieces, of which one is left out: documents before and behind stay others."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(pieces, "SMALL_BYTES", 50)
    lines = [b"x" * 99 + b"\n"] * 3
    lines[bad] = b"\xff" * 99 + b"\n"
    (tmp_path / "a.txt").write_bytes(b"before")
    (tmp_path / "b.txt").write_bytes(b"".join(lines))
    (tmp_path / "c.txt").write_bytes(b"behind")
    chosen = Settings(held_out=0.0, block_size=512, skip_faulty=1, end_of_document="new")
    info = prepare(Selection((str(tmp_path),)), tmp_path / "out", chosen, 1, tell=None)
    tokens, starts = Blocks(str(tmp_path / "out"), "train").read(0)
    kept = [*b"before", 256, *(list(b"x" * 99 + b"\n") * 2), 256, *b"behind", 256]
    assert tokens[: len(kept)].tolist() == kept
    assert starts.tolist() == [0, 7, 208]
    assert info.splits["train"].documents == 3


def test_a_large_json_file_of_both_ways_to_write_is_read(tmp_path, monkeypatch):
    """Records on lines, then one over several: what the first line looks like decides nothing."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr("data_prep.sources.json.PIECE_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_text('{"text": "line"}\n' * 50 + '{\n "text": "over\\nlines"\n}\n')
    assert texts_of(Selection((str(path),))) == ["line"] * 50 + ["over\nlines"]
    path.write_text('{"text": "line"}\n' * 50 + '{"text": "torn\n' + '{"text": "line"}\n' * 50)
    assert len(faults_of(Selection((str(path),)))) == 1  # and nothing else is lost with it
    path.write_text('{"text": "line}{"}\n' + '{"text": "one"} {"text": "two"}\n' * 50)
    assert texts_of(Selection((str(path),))) == ["line}{", *["one", "two"] * 50]
    path.write_text('{"text": "one"}\t {"text": "two"}\n' * 50)
    assert texts_of(Selection((str(path),))) == ["one", "two"] * 50
    path.write_text('{"text": "a", "more": [\n{"text": "no"},\n{"text": "no"}]}\n' * 50)
    assert texts_of(Selection((str(path),))) == ["a"] * 50


def test_lines_are_counted_only_for_what_is_wrong_and_then_right(tmp_path, monkeypatch):
    """Of a file of many chunks, packed, with text that is not ASCII, and in a nested field."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    counted: list[int] = []

    def count(file: File, offset: int) -> int:
        counted.append(offset)
        return pieces.line_number(file, offset)

    monkeypatch.setattr(jsonl, "line_number", count)
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"meta": {"text": f"é {n}"}}) for n in range(100)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    selection = Selection((str(path),), field="meta.text")
    assert texts_of(selection) == [f"é {n}" for n in range(100)]
    assert not counted
    for n in (3, 50, 51, 99):
        lines[n] = "{" if n % 2 else '{"meta": {}}'
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    said = [fault.message for fault in faults_of(selection)]
    assert [message.split(": ")[0] for message in said] == [f"{path}:{n}" for n in (4, 51, 52, 100)]
    assert len(counted) == 1
    plain = tmp_path / "a.jsonl"
    plain.write_text("\n".join(lines))
    said = [fault.message for fault in faults_of(replace(selection, sources=(str(plain),)))]
    assert [message.split(": ")[0] for message in said] == [
        f"{plain}:{n}" for n in (4, 51, 52, 100)
    ]


def test_a_row_group_without_the_field_is_as_many_records(tmp_path):
    meta = pa.array([{"other": "x"}] * 40)
    pq.write_table(pa.table({"meta": meta}), tmp_path / "a.parquet", row_group_size=20)
    faults = faults_of(Selection((str(tmp_path / "a.parquet"),), field="meta.text"))
    assert sum(fault.records for fault in faults) == 40


def test_only_a_files_own_name_says_that_it_has_tabs(tmp_path):
    (tmp_path / "x.tsv.d").mkdir()
    (tmp_path / "x.tsv.d" / "a.csv").write_text("id,text\n1,hello\tthere\n")
    (tmp_path / "x.tsv.d" / "b.tsv.gz").write_bytes(gzip.compress(b"id\ttext\n1\ta,b\n"))
    assert texts_of(Selection((str(tmp_path),))) == ["hello\tthere", "a,b"]


def test_csv_is_read_strictly(tmp_path):
    path = tmp_path / "a.csv"
    for text in ('id,text\n1,"abc\n2,def\n', 'id,text\n1,"abc"def\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.csv:\d: row 1 is not CSV"):
            faults_of(Selection((str(path),)))
    for text in ('"text\nhello\n', '"te"xt,b\n1,2\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.csv:1: the header is not CSV"):
            texts_of(Selection((str(path),)))
    path.write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="2 columns 'text'"):
        texts_of(Selection((str(path),)))
    path.write_text("id,text\n1,a\n\n")
    assert texts_of(Selection((str(path),))) == ["a"]


def test_json_is_read_strictly_and_in_linear_time(tmp_path):
    path = tmp_path / "a.json"
    for text in ('[{"text":"a"},]', '[{"text":"a"} {"text":"b"}]', '[{"text":"a"},,{"text":"b"}]'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not JSON"):
            faults_of(Selection((str(path),)))
    path.write_text('{"text": "a"}\n{\n "text":\n "b"}\n')
    assert texts_of(Selection((str(path),))) == ["a", "b"]
    path.write_text("[" + ",\n".join('{"text": "%s"}' % ("x" * 100) for _ in range(40_000)) + "]")
    started = time.monotonic()
    assert len(texts_of(Selection((str(path),)))) == 40_000
    assert time.monotonic() - started < 5
