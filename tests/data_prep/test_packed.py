"""Packed files give the texts that were packed, all of them, or say that they are damaged."""

import bz2
import gzip
import lzma
import os

import pyarrow as pa
import pytest

from data_prep.sources import Selection, pieces
from tests.data_prep.test_sources import TEXTS, faults_of, texts_of, write


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "csv"])
def test_packed_files_are_read(kind, packing, tmp_path, monkeypatch):
    """In pieces smaller than themselves; and under names in capitals."""
    plain = write(kind, tmp_path, TEXTS)
    packed = tmp_path / f"PACKED{plain.suffix}.{packing}".upper()
    packed.write_bytes(PACKERS[packing](plain.read_bytes()))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    monkeypatch.setattr("data_prep.sources.json.PIECE_BYTES", 50)
    assert texts_of(Selection((str(packed),))) == TEXTS


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_text_is_one_document_however_it_is_read(packing, tmp_path, monkeypatch):
    text = "".join(f"line {i} äöü\n" for i in range(300)) + "é" * 3000
    path = tmp_path / f"a.txt.{packing}"
    path.write_bytes(PACKERS[packing](text.encode()))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1001)
    assert texts_of(Selection((str(path),))) == [text]


def test_a_torn_packed_file_is_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-3000])
    with pytest.raises(ValueError, match=r"a\.txt\.gz cannot be unpacked after"):
        texts_of(Selection((str(path),)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_damaged_packed_files_are_named(suffix, packing, tmp_path):
    whole = write(suffix if suffix != "txt" else "jsonl", tmp_path, TEXTS * 50).read_bytes()
    original = TEXTS * 50 if suffix != "txt" else [whole.decode()]
    packed = bytearray(PACKERS[packing](whole))
    path = tmp_path / f"damaged.{suffix}.{packing}"
    for how in ("torn", "changed", "empty", "nonsense"):
        changed = packed[:30] + bytes(20) + packed[50:]
        data = {"torn": packed[: len(packed) // 2], "changed": changed, "empty": b""}
        path.write_bytes(bytes(data.get(how, os.urandom(100))))
        selection, told = Selection((str(path),)), None
        try:
            said = [fault.message for fault in faults_of(selection)]
            told = texts_of(selection) if not said else None
        except ValueError as error:
            said = [str(error)]
        if how in ("torn", "nonsense"):
            assert said
        if how == "changed":
            assert said or told == original, "other texts, and nothing said"
        assert all(str(path) in text for text in said), (how, said)


@pytest.mark.parametrize("packing", ["bz2", "xz", "gz", "zst"])
def test_all_of_what_a_parallel_packer_wrote_is_read(packing, tmp_path):
    """Streams one after another; one that is damaged is told, not left out."""
    text = os.urandom(200_000).hex()
    streams = [
        PACKERS[packing](text[at : at + 50_000].encode()) for at in range(0, 400_000, 50_000)
    ]
    path = tmp_path / f"a.txt.{packing}"
    path.write_bytes(b"".join(streams))
    assert texts_of(Selection((str(path),))) == [text]
    padding = {"xz": bytes(8), "gz": bytes(8)}.get(packing, b"")
    path.write_bytes(padding.join(streams) + padding)
    assert texts_of(Selection((str(path),))) == [text]
    for spoiled in (bytes([1]) + streams[-1][1:], b"GARBAGE!", streams[-1][:-9]):
        path.write_bytes(b"".join(streams[:-1]) + spoiled)
        with pytest.raises(ValueError, match=f"{path} cannot be (unpacked|read)"):
            texts_of(Selection((str(path),)))
