"""Sources that change, or that their stores list differently from one look to the next."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from data_prep import write
from data_prep.blocks import Blocks
from data_prep.parts import read_tokens
from data_prep.remote import Remote
from data_prep.sources import Selection, plan
from data_prep.sources.storage import _known_by
from data_prep.write import Settings, prepare
from models.scan.library import _cache_home
from tests.data_prep.test_data_prep import tokens_of

CHOSEN = Settings(block_size=8, held_out=0.0)


class _Store:
    """Of s3: an object alone, and the same as one of a folder."""

    def __init__(self, **listed: object) -> None:
        self.listed = listed

    def info(self, name: str) -> dict[str, object]:
        return {"name": name, "size": 7, "ETag": '"abc"', **self.listed}


def test_an_object_is_known_by_its_content_however_it_was_listed():
    alone, among = _Store(LastModified="now", type="file"), _Store(StorageClass="STANDARD", Key="k")
    assert _known_by(alone, "bucket/a.txt") == _known_by(among, "other/b.txt")
    assert _known_by(alone, "a") != _known_by(_Store(ETag='"other"'), "a")


def test_what_is_held_out_at_an_address_is_not_trained_on():
    """Though it has no other name there; hidden objects are no sources, and are told."""
    far = fsspec.filesystem("memory")
    for name in ("a.txt", "b.txt", ".git/config"):
        far.pipe_file(f"/held/in/{name}", name.encode() * 9)
    notes: list[str] = []
    found = plan(Selection(("memory://held/in",), ("memory://held/in/b.txt",)), None, notes)
    splits = [(f.name, f.split) for piece in found for f in piece.files]
    assert splits == [("a.txt", "train"), ("b.txt", "held_out")]
    assert any("1 hidden files and folders are left out" in note for note in notes)
    assert any("b.txt: held out, so it is not trained on" in note for note in notes)


def test_an_address_of_data_may_end_in_a_slash(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 50)
    prepare(Selection((str(tmp_path / "a.txt"),)), tmp_path / "out", CHOSEN, 1, tell=None)
    blocks = Blocks(f"file://{tmp_path}/out/", "train", str(tmp_path / "cache"))
    assert bytes(blocks.read(0)[0].tolist()) == b"text\ntex"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """On the way to an address, and where kernels are built: as containers have such users."""

    def lost() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(lost))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ValueError, match="Set XDG_CACHE_HOME"):
        Remote("memory://bucket/set").folder()
    with pytest.raises(OSError, match="Set XDG_CACHE_HOME"):
        _cache_home()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _cache_home() == Path("/somewhere")


def test_bytes_too_are_not_ended_by_a_byte_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 50)
    chosen = Settings(block_size=8, held_out=0.0, end_of_document="\n")
    with pytest.raises(ValueError, match="becomes the token that ends documents"):
        prepare(Selection((str(tmp_path / "a.txt"),)), tmp_path / "out", chosen, 1, tell=None)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and where it is served over http, with neither digests nor times."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send_header(self, keyword: str, value: str) -> None:
            if keyword != "Last-Modified":
                super().send_header(keyword, value)

    handler = partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_page_that_changed_is_another_source(served, tmp_path):
    folder, address = served
    (folder / "a.txt").write_text("first\n" * 20)
    selection = Selection((f"{address}/a.txt",))
    prepare(selection, tmp_path / "out", CHOSEN, 1, tell=None)
    prepare(selection, tmp_path / "out", CHOSEN, 1, tell=None)
    (folder / "a.txt").write_text("other\n" * 20)
    with pytest.raises(ValueError, match="was prepared from other sources, an older state"):
        prepare(selection, tmp_path / "out", CHOSEN, 1, tell=None)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.txt"])
def test_a_file_that_is_written_to_meanwhile_is_refused(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_text({"a.csv": "text\none\n", "a.json": '[{"text": "one"}]'}.get(name, "one\n"))
    tokenize = write.tokenize

    def after_a_change(*arguments: object, **more: object) -> None:
        path.write_text(path.read_text().replace("one", "two"))
        tokenize(*arguments, **more)

    monkeypatch.setattr(write, "tokenize", after_a_change)
    with pytest.raises(ValueError, match=f"{name} changed while it was read"):
        prepare(Selection((str(path),)), tmp_path / "out", CHOSEN, 1, tell=None)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(write, "tokenize", tokenize)
    path.write_text(path.read_text().replace("two", "one"))  # as it was hashed before
    prepare(Selection((str(path),)), tmp_path / "before", CHOSEN, 1, tell=None)
    prepare(Selection((str(path),)), tmp_path / "out", CHOSEN, 1, tell=None)
    assert tokens_of(tmp_path / "out", "train") == tokens_of(tmp_path / "before", "train")
    shutil.rmtree(tmp_path / "out")
    path.write_text(path.read_text().replace("one", "two"))
    prepare(Selection((str(path),)), tmp_path / "out", CHOSEN, 1, tell=None)
    assert b"two" in tokens_of(tmp_path / "out", "train")


def test_a_part_that_a_power_cut_left_short_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text\n" * 50)
    selection = Selection((str(tmp_path / "a.txt"),))

    def lost(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(write, "seal_dataset", lost)
        with pytest.raises(KeyboardInterrupt):
            prepare(selection, tmp_path / "out", CHOSEN, 1, tell=None)
    (part,) = (tmp_path / "out.partial" / "parts").glob("*.tokens")
    assert len(read_tokens(part, "uint8")) == 250
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"has 100 tokens instead of 250: remove .*out\.partial"):
        prepare(selection, tmp_path / "out", CHOSEN, 1, tell=None)
