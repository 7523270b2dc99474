"""What is read is what was written, in its place: else it is refused, in one sentence."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest

from data_prep.blocks import Blocks, DataError
from data_prep.schema import SPLITS, load_info
from data_prep.verify import verify
from tests.data_prep.test_data_prep import make_tokenizer, run_prepare, write_documents


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run_prepare(write_documents(tmp_path / "text"), tmp_path / "out", block_size=200)
    return tmp_path / "out"


def everything(folder: Path) -> list[bytes]:
    """All blocks of all splits, as a training reads them."""
    found = []
    for split in SPLITS:
        blocks = Blocks(str(folder), split)
        for index in range(load_info(folder).splits[split].blocks):
            tokens, starts = blocks.read(index)
            found.append(tokens.tobytes() + starts.tobytes())
    return found


def shards(folder: Path, split: str = "train") -> list[Path]:
    return sorted((folder / split).glob("*.mds"))


def test_files_swapped_or_copied_over_each_other_are_refused(tmp_path):
    """Of one size, so that an index finds nothing: a block knows its place."""
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(10_000)))
    out = tmp_path / "out"
    run_prepare(tmp_path / "book.txt", out)
    by_size: dict[int, list[Path]] = {}
    for path in shards(out):
        by_size.setdefault(path.stat().st_size, []).append(path)
    first, second = next(paths for paths in by_size.values() if len(paths) > 1)[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DataError, match="is damaged or of another place"):
        everything(out)
    assert verify(out, progress=False)
    second.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="is damaged or of another place"):
        everything(out)


def test_a_split_in_the_place_of_another_is_refused(out):
    shutil.rmtree(out / "held_out")
    shutil.copytree(out / "train", out / "held_out")
    with pytest.raises(DataError, match="is not the index that was written"):
        Blocks(str(out), "held_out")


def test_another_tokenizer_in_its_place_is_refused(tmp_path):
    given = make_tokenizer(tmp_path / "bpe.json")
    run_prepare(write_documents(tmp_path / "text"), tmp_path / "out", tokenizer=str(given))
    path = tmp_path / "out" / "tokenizer.json"
    path.write_text(path.read_text().replace("true", "false", 1))
    with pytest.raises(ValueError, match="is not the tokenizer that the data were prepared with"):
        verify(tmp_path / "out", progress=False)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load_info(tmp_path / "out")


class Evil:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("honest", [True, False])
def test_no_pickle_is_read(out, tmp_path, honest):
    """A column of another type is refused by its name, before any of it is read."""
    from streaming import MDSWriter

    trace = tmp_path / "trace"
    shutil.rmtree(out / "train")
    columns = {"crc32": "uint32", "starts": "bytes", "tokens": "pkl"}
    with MDSWriter(columns=columns, out=str(out / "train"), hashes=["sha256"]) as writer:
        writer.write({"crc32": 0, "starts": b"", "tokens": Evil(trace)})
    if honest:  # its author writes the digests anew
        from data_prep.files import file_sha256

        info = load_info(out)
        info.splits["train"].index_sha256 = file_sha256(out / "train" / "index.json")
        info.splits["train"].blocks = 1
        info.splits["train"].tokens = 1
        info.dump(out)
    said = "its columns are" if honest else "is not the index that was written"
    assert any(said in fault for fault in verify(out, progress=False))
    with pytest.raises(DataError, match=said):
        Blocks(str(out), "train")
    assert not trace.exists()
    assert pickle.dumps(Evil(trace))


# Wrong fields of dataset.json, with a digest that fits: each is one sentence.
WRONG = {
    "version": 7,
    "splits": {},
    "vocab_size": "many",
    "block_size": 0,
    "dtype": "object",
    "synthetic": {"task": 1},
    "more": 1,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_schema_is_one_sentence(out, key):
    from data_prep import schema

    path = out / "dataset.json"
    raw = json.loads(path.read_text()) | {key: WRONG[key]}
    raw["digest"] = schema._digest(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"dataset\.json is .*: prepare the data again") as caught:
        load_info(out)
    assert "\n" not in str(caught.value)


def mutate(folder: Path, dice: random.Random) -> str:
    """Change one file below the folder somehow; what was done."""
    path = dice.choice([p for p in sorted(folder.rglob("*")) if p.is_file()])
    data = bytearray(path.read_bytes())
    how = dice.choice(["flip", "cut", "empty", "remove", "double", "swap", "zeros", "text"])
    if how == "flip" and data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif how == "cut":
        data = data[: dice.randrange(len(data) or 1)]
    elif how == "empty":
        data = bytearray()
    elif how == "double":
        data = data * 2
    elif how == "swap":
        data = bytearray(dice.choice(sorted(folder.rglob("*.*"))).read_bytes())
    elif how == "zeros" and data:
        at = dice.randrange(len(data))
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif how == "text":
        data = bytearray(bytes(data).replace(b"0", b"1", 1))
    path.write_bytes(data)
    if how == "remove":
        path.unlink()
    return f"{how} {path.name}"


def refused_or_identical(out: Path, tmp_path: Path, seeds: range) -> tuple[int, int]:
    """(refused, identical) of as many mutations. Anything else fails."""
    whole = everything(out)
    refused = identical = 0
    for seed in seeds:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        done = mutate(copy, random.Random(seed))
        try:
            read = everything(copy)
        except ValueError as error:
            refused += str(copy) in str(error)  # it names what is wrong
        else:
            identical += read == whole
        try:
            faults = verify(copy, progress=False)
        except ValueError:
            faults = ["refused"]
        assert faults or everything(copy) == whole, done
    return refused, identical


def test_a_changed_folder_is_refused_or_reads_the_same(out, tmp_path):
    refused, identical = refused_or_identical(out, tmp_path, range(60))
    assert refused > 30
    assert refused + identical == 60


@pytest.mark.soak
def test_many_changed_folders(out, tmp_path, fuzz_counts):
    count = int(os.environ.get("LONGHAUL_FUZZ", "1000"))
    refused, identical = refused_or_identical(out, tmp_path, range(count))
    assert refused + identical == count
    fuzz_counts.append(
        {
            "what": "prepared folders with a file changed",
            "tried": count,
            "refused by name": refused,
            "as if nothing were": identical,
            "else": 0,
        }
    )
