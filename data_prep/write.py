"""Tokenize in parallel, then pack into MDS shard files: interrupted and run again, the same bytes.

Work goes on in DIR.partial: first a part of tokens per piece, each written whole or not at all
and kept across interruptions; then the MDS shard files, packed from those in order. Only when
everything is on disk is DIR.partial renamed to DIR: a folder that looks finished is finished.
"""

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.files import file_sha256, sync_to_disk
from data_prep.pack import Streams, pack
from data_prep.parts import document_key
from data_prep.remote import Remote
from data_prep.schema import INFO_NAME, SPLITS, TOKENIZER_NAME, DatasetInfo, load_info
from data_prep.sources import Piece, Selection, plan
from data_prep.tokenize import Limits, Work, tokenize
from data_prep.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer

LARGEST_BLOCK = 1 << 24  # tokens
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, besides the sources."""

    tokenizer: str = "bytes"
    held_out: float = 0.05  # share of the tokens kept for evaluation
    block_size: int = 4096  # tokens per block
    end_of_document: str | None = None  # a token of the tokenizer, or `new` for one of its own
    skip_faulty: int = 0  # records that may be left out
    allow_changes: bool = False  # tokens need not decode to the text
    shard_bytes: int = 1 << 26


def prepare(
    selection: Selection, out: Path, settings: Settings, workers: int, tell: Tell | None = print
) -> DatasetInfo:
    """Write DIR from the sources, or go on where an interrupted call stopped.

    What was left out, and why, goes to `tell`; None: nothing is shown. Raises ValueError for bad
    input, naming file and line, and for a target that cannot be written or holds something else.
    """
    return _write(_planned(selection, out, settings, tell), out, settings, workers, tell)


def prepare_remote(
    selection: Selection, out: Remote, settings: Settings, workers: int, tell: Tell | None = print
) -> DatasetInfo:
    """The same at an address: made in a folder of this machine, and brought there when whole."""
    for source in selection.sources + selection.held_out_from:
        if out.within(source):
            raise ValueError(f"--out {out.address} lies in the source {source}: choose another")
    folder = out.folder()
    planned = _planned(selection, folder, settings, tell)
    if there := out.existing():
        return _asked_for(there, planned.fingerprint, out.address)
    folder /= planned.fingerprint[:16]
    info = _write(planned, folder, settings, workers, tell)
    out.upload(folder)
    shutil.rmtree(folder)
    return info


@dataclass(frozen=True)
class _Plan:
    """What is to be prepared, before any of it is."""

    selection: Selection
    tokenizer: Tokenizer
    end: int | None  # the token after every document
    vocab_size: int
    pieces: list[Piece]
    described: str  # whatever decides the tokens of a piece, beside its text
    fingerprint: str


def _planned(selection: Selection, out: Path, settings: Settings, tell: Tell | None) -> _Plan:
    _check(selection, settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    end, vocab_size = _end_of_document(settings, tokenizer)
    notes: list[str] = []
    pieces = plan(selection, out, notes)
    described = json.dumps(
        [selection.field, settings.block_size, settings.end_of_document, tokenizer.fingerprint]
    )
    identity = [asdict(settings) | {"tokenizer": ""}, described, _identity(pieces)]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if tell:
        for note in notes:
            tell(f"note: {note}")
    return _Plan(selection, tokenizer, end, vocab_size, pieces, described, fingerprint)


def _write(
    planned: _Plan, out: Path, settings: Settings, workers: int, tell: Tell | None
) -> DatasetInfo:
    if out.exists():
        return existing_dataset(out, planned.fingerprint)
    info = DatasetInfo(
        tokenizer=planned.tokenizer.name,
        vocab_size=planned.vocab_size,
        block_size=settings.block_size,
        dtype=np.min_scalar_type(planned.vocab_size - 1).name,
        fingerprint=planned.fingerprint,
        end_of_document=planned.end,
    )
    say = tell or (lambda line: None)
    partial = out.with_name(out.name + ".partial")
    with only_writer(partial, out):
        keys = (_piece_key(piece, planned.described) for piece in planned.pieces)
        parts = [partial / "parts" / f"{i:06}-{key}.npz" for i, key in enumerate(keys)]
        tokenizer = str(getattr(planned.tokenizer, "path", "bytes")), planned.tokenizer.fingerprint
        work = [
            Work(piece, part, *tokenizer, planned.selection.field, info.dtype, planned.end)
            for piece, part in zip(planned.pieces, parts, strict=True)
        ]
        limits = Limits(settings.skip_faulty, settings.allow_changes)
        tokenize(work, limits, workers, progress=tell is not None)
        info.left_out, info.changed_texts = limits.left_out, limits.changed_texts
        for line in _told(limits):
            say(line)
        streams = seal_dataset(parts, info, settings, partial, out, planned.tokenizer)
    for line in [] if planned.selection.held_out_from else _held_out(streams, planned.pieces):
        say(line)
    return info


@contextmanager
def only_writer(partial: Path, out: Path, goes_on: bool = False) -> Iterator[None]:
    """Be the only one that prepares `out`, which is not there yet, or `goes_on` in it.

    Raises ValueError where another is, or nobody can.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}: {error.filename}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another data_prep is writing {out}: wait for it to end") from None
        if out.exists() and not goes_on:  # since it was looked for
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"another data_prep has just written {out}: the same command finds it")
        (partial / "parts").mkdir(exist_ok=True)
        yield


def _check(selection: Selection, settings: Settings) -> None:
    if not 0 <= settings.held_out < 1:  # not NaN either
        raise ValueError(f"--held-out {settings.held_out} is not in [0, 1)")
    if not 1 <= settings.block_size <= LARGEST_BLOCK:
        raise ValueError(f"--block-size {settings.block_size} is not from 1 to {LARGEST_BLOCK:,}")
    if settings.skip_faulty < 0:
        raise ValueError(f"--skip-faulty {settings.skip_faulty} is negative")
    if not math.isfinite(settings.shard_bytes) or settings.shard_bytes < 1:
        raise ValueError(f"shard_bytes {settings.shard_bytes} is not positive")


def _end_of_document(settings: Settings, tokenizer: Tokenizer) -> tuple[int | None, int]:
    """The token after every document, and how many tokens there are with it."""
    name = settings.end_of_document
    if name is None:
        return None, tokenizer.vocab_size
    if name == "new":
        return tokenizer.vocab_size, tokenizer.vocab_size + 1
    index = tokenizer.token_id(name)
    if index is None:
        raise ValueError(
            f"--end-of-document {name!r} is not a token of {tokenizer.name}: name one of its, or "
            f"`new` for a token of its own"
        )
    return index, tokenizer.vocab_size


def _told(limits: Limits) -> Iterator[str]:
    if limits.left_out:
        yield f"left out {limits.lost} faulty records, listed in {INFO_NAME}; the first:"
        yield from (f"  {line}" for line in limits.left_out[:10])
    if limits.changed:
        yield f"the tokenizer changes {limits.changed_texts} texts; the first: {limits.changed[0]}"
    if limits.marks:
        yield f"left out the byte-order marks at the beginning of {limits.marks} files"


def _held_out(streams: Streams, pieces: list[Piece]) -> Iterator[str]:
    """Which large documents are held out: whoever evaluates on them should know."""
    for part, key, tokens, cut in streams.large_held_out():
        files = pieces[part].files
        named = " or ".join(f.path for f in files if document_key(f.name) == key)
        document = pieces[part].document or named or f"a document of {files[0].path}"
        what = f"the last {tokens:,} tokens of {document}" if cut else f"all of {document}"
        yield f"held out: {what}" + ("" if cut else f" ({tokens:,} tokens)")


def seal_dataset(
    parts: list[Path],
    info: DatasetInfo,
    settings: Settings,
    partial: Path,
    out: Path,
    tokenizer: Tokenizer | None = None,
) -> Streams:
    """Pack the parts into `partial`, complete `info`, and rename the folder to what it is now."""
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer)
    streams = Streams(parts, info, settings.held_out, tokenizer)
    for split in SPLITS:
        folder = partial / split
        info.splits[split] = pack(streams.of(split), info, split, folder, settings.shard_bytes)
    _check_not_empty(info, settings)
    (partial / TOKENIZER_NAME).unlink(missing_ok=True)  # of a command that was interrupted
    if isinstance(tokenizer, JsonTokenizer):
        shutil.copyfile(tokenizer.path, partial / TOKENIZER_NAME)
        info.tokenizer_sha256 = file_sha256(partial / TOKENIZER_NAME)
        if info.tokenizer_sha256 != tokenizer.fingerprint:
            raise ValueError(f"{tokenizer.path} changed meanwhile: run again when it is whole")
    info.dump(partial)
    shutil.rmtree(partial / "parts")
    for path in [*partial.rglob("*"), partial]:
        sync_to_disk(path)
    partial.rename(out)
    (out / "lock").unlink(missing_ok=True)  # held until here
    sync_to_disk(out.parent)
    return streams


def existing_dataset(out: Path, fingerprint: str) -> DatasetInfo:
    """What `out` holds, if that is what was asked for."""
    if not (out / INFO_NAME).is_file():
        raise ValueError(f"{out} exists and is not a prepared dataset: choose another --out")
    return _asked_for(load_info(out), fingerprint, str(out))


def _asked_for(info: DatasetInfo, fingerprint: str, where: str) -> DatasetInfo:
    if info.fingerprint != fingerprint:
        raise ValueError(
            f"{where} was prepared from other sources, an older state of them, or other settings: "
            f"choose another --out, or remove it first"
        )
    return info


def _identity(pieces: list[Piece]) -> list[tuple[str, ...]]:
    """What the sources are, in order: names and content, not where they lie nor since when."""
    first = (piece for piece in pieces if piece.start == 0 and piece.group == 0)
    return [
        (str(p.document), f.name, f.content, f.kind, f.packing, str(f.split))
        for p in first
        for f in p.files
    ]


def _piece_key(piece: Piece, described: str) -> str:
    """A name for a piece's tokens that changes with whatever would change them."""
    files = [(f.name, f.content, f.kind, f.packing, f.split) for f in piece.files]
    place = (piece.start, piece.end, piece.group, piece.document, piece.starts, piece.ends)
    return hashlib.sha256(json.dumps([described, files, place]).encode()).hexdigest()[:32]


def _check_not_empty(info: DatasetInfo, settings: Settings) -> None:
    train, held_out = (info.splits[split].tokens for split in SPLITS)
    if not train and not held_out:
        raise ValueError("the sources hold no text")
    if not train or (settings.held_out and not held_out):
        raise ValueError(
            f"the {'held_out' if train else 'train'} split is empty, of {train + held_out} tokens: "
            f"hold out another share (--held-out, 0 for none), or other files (--held-out-from)"
        )
