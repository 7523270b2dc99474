"""Text to shards: the same bytes however often interrupted, and never a folder that lies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.schema import DatasetInfo, load_info
from data_prep.sources import Selection, pieces, plan, read
from data_prep.tokenizer import JsonTokenizer
from data_prep.verify import verify
from data_prep.write import Settings, prepare

ROOT = Path(__file__).parents[2]


def tokens_of(folder: Path, split: str) -> bytes:
    """All tokens of a split of bytes, as text."""
    from streaming import LocalDataset

    info = load_info(folder)
    blocks = LocalDataset(local=str(folder), split=split)
    joined = np.concatenate([blocks[i]["tokens"] for i in range(len(blocks))])
    return joined[: info.splits[split].tokens].tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def write_documents(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"document {i} é\n" * (i + 1))
    return folder


def run_prepare(source: Path, out: Path, **settings: object) -> None:
    field = str(settings.pop("field", "text"))
    chosen = Settings(**{"held_out": 0.2, "block_size": 100, "shard_bytes": 4000, **settings})
    prepare(Selection((str(source),), field=field), out, chosen, workers=1, tell=None)


def test_folder_of_text_is_kept_whole_and_split_by_document(tmp_path):
    source = write_documents(tmp_path / "text")
    out = tmp_path / "out"
    run_prepare(source, out)
    info = load_info(out)
    train, held_out = tokens_of(out, "train"), tokens_of(out, "held_out")
    assert info.splits["train"].documents + info.splits["held_out"].documents == 40
    assert info.splits["held_out"].documents > 0
    for i in range(40):
        document = (source / f"{i:03}.txt").read_bytes()
        assert (document in train) != (document in held_out)
    assert len(train) + len(held_out) == sum(p.stat().st_size for p in source.iterdir())
    assert verify(out, progress=False) == []
    assert len(list((out / "train").glob("*.mds"))) > 1


def test_pieces_change_nothing(tmp_path, monkeypatch):
    """Documents larger than a piece, cut at lines or, without lines, at characters."""
    source = tmp_path / "text"
    source.mkdir()
    (source / "lines.txt").write_text("".join(f"line {i} äöü\n" for i in range(3000)))
    (source / "one-line.txt").write_text("é" * 20_000)
    (source / "more.txt").write_text("x\n")
    run_prepare(source, tmp_path / "large", held_out=0.0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1001)
    assert len(plan(Selection((str(source),)), None, [])) > 60
    run_prepare(source, tmp_path / "small", held_out=0.0)
    assert tokens_of(tmp_path / "large", "train") == tokens_of(tmp_path / "small", "train")
    infos = [load_info(tmp_path / name).splits["train"] for name in ("large", "small")]
    assert infos[0] == infos[1]  # the same number of documents and the same index


@pytest.mark.slow
def test_interrupted_and_run_again_gives_the_same_bytes(tmp_path):
    """Killed at several moments, the command finishes with the bytes of one that was not."""
    source = tmp_path / "big.jsonl"
    line = json.dumps({"text": "interrupted and run again " * 30})
    with source.open("w") as f:
        for i in range(30_000):
            f.write(line.replace("run", f"run {i}") + "\n")
    command = [sys.executable, "-m", "data_prep", str(source), "--workers", "2", "--out"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, str(straight)], cwd=ROOT, check=True, capture_output=True)
    partial = tmp_path / "killed.partial"
    # amid the parts, amid the packing, and not
    for moment in ("parts/*.npz", "train", None):
        attempt = subprocess.Popen(
            [*command, str(killed)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if moment is None:
            assert attempt.wait(100) == 0
            break
        deadline = time.monotonic() + 100
        while not list(partial.glob(moment)):
            assert attempt.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(attempt.pid, signal.SIGKILL)
        attempt.wait()
        assert not killed.exists()
        assert list(partial.glob(moment))
    assert contents(killed) == contents(straight)
    assert verify(killed, progress=False) == []


def test_every_flag_arrives_where_it_belongs(tmp_path, monkeypatch):
    asked: list[tuple[Selection, Settings, Path, int]] = []

    def prepared(selection: Selection, out: Path, settings: Settings, workers: int) -> DatasetInfo:
        asked.append((selection, settings, out, workers))
        return load_info(tmp_path / "real")

    run_prepare(write_documents(tmp_path / "text"), tmp_path / "real")
    monkeypatch.setattr("data_prep.__main__.prepare", prepared)
    flags = (
        "a.csv b --out OUT --tokenizer t.json --field x.y --format csv --include *.csv --include"
    )
    flags += " *.tsv --exclude *bad* --held-out-from c --held-out-from d --block-size 99"
    flags += " --end-of-document new --skip-faulty 5 --allow-changes --workers 3"
    assert main(flags.replace("OUT", str(tmp_path / "out")).split()) == 0
    selection = Selection(
        sources=("a.csv", "b"),
        held_out_from=("c", "d"),
        include=("*.csv", "*.tsv"),
        exclude=("*bad*",),
        kind="csv",
        field="x.y",
    )
    settings = Settings(
        tokenizer="t.json",
        block_size=99,
        end_of_document="new",
        skip_faulty=5,
        allow_changes=True,
    )
    assert asked == [(selection, settings, tmp_path / "out", 3)]
    assert main(["a", "--out", "b", "--held-out", "0.25"]) == 0
    assert asked[1][:2] == (Selection(("a",)), Settings(held_out=0.25))
    assert main(["a", "--out", "b", "--held-out", "0.25", "--held-out-from", "c"]) == 1
    assert len(asked) == 2


def test_the_same_command_again_does_nothing_and_another_is_refused(tmp_path):
    source = write_documents(tmp_path / "text")
    run_prepare(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    run_prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="other settings"):
        run_prepare(source, tmp_path / "out", block_size=50)
    (source / "new.txt").write_text("new")
    with pytest.raises(ValueError, match="was prepared from other sources"):
        run_prepare(source, tmp_path / "out")


def test_jsonl_and_parquet_hold_the_same_documents(tmp_path):
    texts = [f"text {i} " * 20 for i in range(50)]
    with (tmp_path / "a.jsonl").open("w") as f:
        f.writelines(json.dumps({"body": text, "id": i}) + "\n\n" for i, text in enumerate(texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet", row_group_size=7)
    for name in ("a.jsonl", "a.parquet"):
        run_prepare(tmp_path / name, tmp_path / f"{name}.out", field="body", held_out=0.0)
        assert tokens_of(tmp_path / f"{name}.out", "train").decode() == "".join(texts)
        assert load_info(tmp_path / f"{name}.out").splits["train"].documents == 50


def test_a_single_document_is_held_out_at_its_end(tmp_path):
    source = tmp_path / "book.txt"
    source.write_text("".join(f"line {i}\n" for i in range(1000)))
    run_prepare(source, tmp_path / "out", held_out=0.1)
    joined = tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "held_out")
    assert joined == source.read_bytes()
    share = load_info(tmp_path / "out").splits["held_out"].tokens / len(joined)
    assert 0.09 < share < 0.11


def make_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["document é scan carry halo " * 50], trainer)
    tokenizer.save(str(path))
    return path


def test_hugging_face_tokenizer_travels_with_the_data(tmp_path):
    source = write_documents(tmp_path / "text")
    given = make_tokenizer(tmp_path / "bpe.json")
    run_prepare(source, tmp_path / "out", tokenizer=str(given), held_out=0.2)
    info = load_info(tmp_path / "out")
    assert info.dtype == "uint16"
    assert info.splits["train"].tokens < info.splits["train"].text_bytes / 2
    assert verify(tmp_path / "out", progress=False) == []
    carried = JsonTokenizer(tmp_path / "out" / "tokenizer.json")
    tokens = carried.encode("document 7 é\n").tolist()
    assert carried.decode(tokens) == "document 7 é\n"
    stream = carried.decode_stream()
    assert "".join(map(stream.step, tokens)) + stream.end() == "document 7 é\n"


def test_stdlib_is_text_with_long_documents():
    pieces = plan(Selection(("stdlib",)), None, [])
    names = {piece.document for piece in pieces}
    assert {"stdlib/json", "stdlib/asyncio", "stdlib/argparse.py"} <= names
    paths = [file.path for piece in pieces for file in piece.files]
    assert not any("site-packages" in path or "/test/" in path for path in paths)
    (text,) = list(read(next(p for p in pieces if p.document == "stdlib/os.py"), "text"))
    assert text.starts
    assert "def makedirs" in text.text


# Arguments that cannot work, and what their message must hold.
BAD_INPUT = {
    "undecodable": (["latin.txt"], "latin.txt:3: byte 0xe9 is not UTF-8"),
    "empty": (["empty.txt"], "hold no text"),
    "empty folder": (["hollow"], "holds no files"),
    "absent": (["nowhere.txt"], "neither a file, a folder nor `stdlib`"),
    "torn line": (["torn.jsonl"], "torn.jsonl:3: not JSON"),
    "missing field": (["fields.jsonl"], "fields.jsonl:2: no field 'text' (it has: body, id)"),
    "not a text": (["number.jsonl"], "number.jsonl:2: field 'text' is not a text but int"),
    "not parquet": (["fake.parquet"], "is not a parquet file"),
    "missing column": (["other.parquet"], "no column 'text' (it has: body)"),
    "null": (["null.parquet"], "row group 0, row 1: column 'text' is null"),
    "tokenizer": (["good.txt", "--tokenizer", "tokenizer.json"], "cannot be read"),
    "share": (["good.txt", "--held-out", "1.5"], "is not in [0, 1)"),
    "unwritable": (["good.txt", "--out", "good.txt/below"], "cannot write to"),
    "taken": (["good.txt", "--out", "hollow"], "is not a prepared dataset"),
}


def write_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fine\nalso fine\ncaf\xe9\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (tmp_path / "fields.jsonl").write_text('{"text": "a"}\n{"body": "b", "id": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (tmp_path / "fake.parquet").write_text("no parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "null.parquet")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "good.txt").write_text("good\n" * 100)


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named_and_leaves_nothing_finished(
    arguments, said, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_bad_sources(tmp_path)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    assert main([*arguments, "--workers", "1"]) == 1
    errors = capfd.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_verify_names_what_was_damaged(tmp_path, capsys):
    run_prepare(write_documents(tmp_path / "text"), tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "train" / "shard.00001.mds"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert f"{shard} does not have the sha256" in capsys.readouterr().err
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    shard.write_bytes(bytes(data[:-1] + bytes([data[-1]])))
    info["splits"]["held_out"]["tokens"] += info["block_size"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="is not as it was written"):
        verify(tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="it is not a prepared dataset"):
        verify(tmp_path / "text", progress=False)


PEAKS = """
import resource, sys
from data_prep.__main__ import main

if __name__ == "__main__":
    assert main([*sys.argv[1:], "--workers", "1"]) == 0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print("peak", resource.getrusage(who).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path):
    """The peak of packer and tokenizers on 240 MB of text is that on 80 MB, but for noise."""
    script = tmp_path / "script.py"
    script.write_text(PEAKS)
    peaks = []
    for megabytes in (80, 240):  # each more than a shard
        source = tmp_path / f"{megabytes}.txt"
        with source.open("w") as f:
            for _ in range(megabytes):
                f.write(("x" * 99 + "\n") * 10_000)
        done = subprocess.run(
            [sys.executable, str(script), str(source), "--out", str(tmp_path / f"out{megabytes}")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("peak")]
        peaks.append([int(line.split()[1]) / 1024 for line in lines])
    for small, large in zip(*peaks, strict=True):
        assert large < small + 80, peaks
