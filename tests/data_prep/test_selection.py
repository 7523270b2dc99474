"""Which files are sources: all that were named, and no others; what is said of the rest."""

import gzip
import os

import fsspec
import pytest

from data_prep.remote import Remote
from data_prep.sources import Selection, plan
from data_prep.write import Settings, prepare, prepare_remote
from tests.data_prep.test_data_prep import tokens_of
from tests.data_prep.test_sources import texts_of


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.md", "deep/c.txt", ".hidden"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("d")
    (folder / "deep" / "loop").symlink_to(folder)
    notes: list[str] = []
    chosen = Selection((str(folder),), include=("*.txt",), exclude=("deep/*",))
    names = [f.name for piece in plan(chosen, None, notes) for f in piece.files]
    assert names == ["a.txt", "link/d.txt"]
    assert any("1 hidden files" in note for note in notes)
    assert any("is a link to" in note for note in notes)
    assert any("2 files are left out by --include and --exclude" in note for note in notes)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="broken is a broken link"):
        plan(Selection((str(folder),)), None, [])


def test_its_own_output_is_never_a_source(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 50)
    out = tmp_path / "prepared"
    for _ in range(2):
        prepare(Selection((str(tmp_path),)), out, Settings(block_size=8), 1, tell=None)
    assert len(tokens_of(out, "train") + tokens_of(out, "held_out")) == 250


def test_identity_is_content_and_not_time_or_place(tmp_path):
    first, second = tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt"
    for path in (first, second):
        path.parent.mkdir()
        path.write_text("text\n" * 50)
    chosen = Settings(block_size=8)
    info = prepare(Selection((str(first),)), tmp_path / "out", chosen, 1, tell=None)
    os.utime(first, (1, 1))
    again = prepare(Selection((str(second),)), tmp_path / "out", chosen, 1, tell=None)
    assert again.fingerprint == info.fingerprint
    stat = second.stat()
    second.write_text("test\n" * 50)
    os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="was prepared from other sources"):
        prepare(Selection((str(second),)), tmp_path / "out", chosen, 1, tell=None)


def test_small_files_share_a_piece_and_stay_documents(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}.txt").write_text(f"document {i}\n")
    found = plan(Selection((str(tmp_path),)), None, [])
    assert len(found) == 1
    assert texts_of(Selection((str(tmp_path),))) == [f"document {i}\n" for i in range(300)]


def test_addresses_are_sources_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "here"}\n')
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert texts_of(Selection((f"file://{tmp_path}",))) == ["here"]
    far = fsspec.filesystem("memory")
    far.pipe_file("/bucket/in/a.jsonl", b'{"text": "far"}\n')
    far.pipe_file("/bucket/in/b.txt.gz", gzip.compress(b"away"))
    assert texts_of(Selection(("memory://bucket/in",))) == ["far", "away"]
    with pytest.raises(ValueError, match=r"holds no files|cannot be read"):
        plan(Selection(("memory://bucket/nowhere",)), None, [])


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """Though it lies in the folder that is; and patterns are of the sources alone."""
    (tmp_path / "a.txt").write_text("train " * 50)
    (tmp_path / "val.txt").write_text("valid " * 50)
    notes: list[str] = []
    held_out = (str(tmp_path / "val.txt"),)
    found = plan(Selection((str(tmp_path),), held_out), None, notes)
    assert [(f.name, f.split) for p in found for f in p.files] == [
        ("a.txt", "train"),
        ("val.txt", "held_out"),
    ]
    assert any("held out, so it is not trained on" in note for note in notes)
    chosen = Selection((str(tmp_path),), held_out, exclude=("val.txt",))
    assert len(plan(chosen, None, [])) == 2


def test_a_source_given_twice_is_another_dataset(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 50)
    source, chosen = str(tmp_path / "a.txt"), Settings(block_size=8)
    prepare(Selection((source,)), tmp_path / "out", chosen, 1, tell=None)
    with pytest.raises(ValueError, match="was prepared from other sources"):
        prepare(Selection((source, source)), tmp_path / "out", chosen, 1, tell=None)


def test_a_dataset_at_an_address_is_the_one_here(tmp_path, monkeypatch):
    """Byte for byte, dataset.json last; again it is found there, and never its own source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = Selection((str(tmp_path / "a.txt"),))
    (tmp_path / "a.txt").write_text("text\n" * 50)
    chosen = Settings(block_size=8)
    here = prepare(source, tmp_path / "out", chosen, 1, tell=None)
    store = fsspec.filesystem("memory")
    put = store.put_file
    brought = []

    def counted(path, target, **options):
        brought.append(target)
        if len(brought) == 3:
            raise OSError("the store is away")
        put(path, target, **options)

    monkeypatch.setattr(type(store), "put_file", staticmethod(counted))
    with pytest.raises(OSError, match="the store is away; run the same command again"):
        prepare_remote(source, Remote("memory://bucket/set"), chosen, 1, tell=None)
    assert not store.exists("/bucket/set/dataset.json")
    told: list[str] = []
    there = prepare_remote(source, Remote("memory://bucket/set"), chosen, 1, told.append)
    assert there == here
    assert brought[-1].endswith("dataset.json")
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    for path in files:
        assert store.cat(f"/bucket/set/{path.relative_to(tmp_path / 'out')}") == path.read_bytes()
    assert len(store.find("/bucket/set")) == len(files)
    assert not list((tmp_path / "cache").rglob("*.mds"))
    count = len(brought)
    assert prepare_remote(source, Remote("memory://bucket/set/"), chosen, 1, tell=None) == here
    assert len(brought) == count
    with pytest.raises(ValueError, match="memory://bucket/set was prepared from other sources"):
        prepare_remote(source, Remote("memory://bucket/set"), Settings(), 1, tell=None)
    inside = Selection(("memory://bucket",))
    with pytest.raises(ValueError, match="lies in the source memory://bucket"):
        prepare_remote(inside, Remote("memory://bucket/set"), chosen, 1, tell=None)
    for address in ("s3://", "://x", "a::s3://b", "nope://x"):
        with pytest.raises(ValueError, match=r"names no place|cannot be used"):
            Remote(address)
    store.rm("/bucket", recursive=True)


def test_large_documents_that_are_held_out_are_named(tmp_path):
    for name, size in (("small", 100), ("large", 5000)):
        (tmp_path / f"{name}.txt").write_text("a" * size)
    told: list[str] = []
    chosen = Settings(block_size=8, held_out=0.3)
    prepare(Selection((str(tmp_path),)), tmp_path / "out", chosen, 1, told.append)
    held_out = [line for line in told if "held out" in line]
    assert held_out == [f"held out: the last 1,430 tokens of {tmp_path / 'large.txt'}"]
    rest = Selection((str(tmp_path / "large.txt"),), held_out_from=(str(tmp_path / "small.txt"),))
    told.clear()
    prepare(rest, tmp_path / "other", chosen, 1, told.append)
    assert not any("tokens of" in line for line in told)
