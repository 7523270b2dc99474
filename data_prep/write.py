"""Tokenize in parallel, then pack into MDS shard files: interrupted and run again, the same bytes.

Work goes on in DIR.partial: first one file of tokens per piece, each written whole or not at all
and kept across interruptions; then the MDS shard files, packed from those in order. Only when
everything is on disk is DIR.partial renamed to DIR: a folder that looks finished is finished.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.files import file_sha256, sync_to_disk, written_whole
from data_prep.schema import (
    INFO_NAME,
    SPLITS,
    TOKENIZER_NAME,
    VERSION,
    DatasetInfo,
    SplitInfo,
    block_checksum,
    load_info,
)
from data_prep.sources import Piece, plan, read
from data_prep.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, besides the sources."""

    tokenizer: str = "bytes"
    field: str = "text"
    held_out: float = 0.05  # share of the documents kept for evaluation
    block_size: int = 4096  # tokens per block
    shard_bytes: int = 1 << 26


def prepare(
    sources: list[str], out: Path, settings: Settings, workers: int, progress: bool = True
) -> DatasetInfo:
    """Write DIR from the sources, or go on where an interrupted call stopped.

    Raises ValueError for bad input, naming file and line, and for a target that cannot be written
    or already holds something else.
    """
    if not 0 <= settings.held_out < 1:
        raise ValueError(f"--held-out {settings.held_out} is not in [0, 1)")
    if settings.block_size < 1:
        raise ValueError(f"--block-size {settings.block_size} is not positive")
    tokenizer = load_tokenizer(settings.tokenizer)
    pieces = plan(sources, settings.field, settings.held_out)
    keys = [
        f"{i:06}-{_piece_key(piece, tokenizer.fingerprint, settings)}"
        for i, piece in enumerate(pieces)
    ]
    fingerprint = hashlib.sha256(json.dumps([asdict(settings), *keys]).encode()).hexdigest()
    if out.exists():
        return existing_dataset(out, fingerprint)

    info = DatasetInfo(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        block_size=settings.block_size,
        dtype=np.min_scalar_type(tokenizer.vocab_size - 1).name,
        fingerprint=fingerprint,
    )
    partial = out.with_name(out.name + ".partial")
    try:
        (partial / "parts").mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}: {error.filename}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another data_prep is writing {out}: wait for it to end") from None
    with lock:
        parts = [partial / "parts" / f"{key}.npz" for key in keys]
        _tokenize(pieces, parts, settings, info.dtype, workers, progress)
        seal_dataset(parts, info, settings, partial, out, sources)
    return info


def seal_dataset(
    parts: list[Path],
    info: DatasetInfo,
    settings: Settings,
    partial: Path,
    out: Path,
    sources: Sequence[str] = (),
) -> None:
    """Pack the parts into `partial`, complete `info`, and rename the folder to what it is now."""
    for split in SPLITS:
        info.splits[split] = _pack(parts, split, partial / split, info, settings)
    _check_not_empty(info, settings, sources)
    if settings.tokenizer != "bytes":
        shutil.copyfile(settings.tokenizer, partial / TOKENIZER_NAME)
    info.dump(partial)
    shutil.rmtree(partial / "parts")
    (partial / "lock").unlink(missing_ok=True)
    for path in [*partial.rglob("*"), partial]:
        sync_to_disk(path)
    partial.rename(out)
    sync_to_disk(out.parent)


def existing_dataset(out: Path, fingerprint: str) -> DatasetInfo:
    """What `out` holds, if that is what was asked for."""
    if not (out / INFO_NAME).is_file():
        raise ValueError(f"{out} exists and is not a prepared dataset: choose another --out")
    info = load_info(out)
    if info.fingerprint != fingerprint:
        raise ValueError(
            f"{out} was prepared from other sources, an older state of them, or other settings: "
            f"choose another --out, or remove it first"
        )
    return info


def _piece_key(piece: Piece, tokenizer_fingerprint: str, settings: Settings) -> str:
    """A name for a piece's tokens that changes with whatever would change them."""
    files = []
    for path in piece.paths:
        stat = os.stat(path)
        files.append((Path(path).name, stat.st_size, stat.st_mtime_ns))
    described = (
        VERSION,
        (piece.kind, piece.document, piece.start, piece.end, piece.split, piece.starts),
        files,
        tokenizer_fingerprint,
        settings.field,
        settings.held_out,
    )
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def document_split(document: str, held_out: float) -> str:
    """The split of a document, from its name alone: sources may be added without moving others."""
    digest = hashlib.sha256(document.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") / 2**64 < held_out else "train"


def _tokenize(
    pieces: list[Piece],
    parts: list[Path],
    settings: Settings,
    dtype: str,
    workers: int,
    progress: bool,
) -> None:
    """Make every part that is not there yet, at most 2 * workers pieces in flight."""
    todo = iter([(p, part) for p, part in zip(pieces, parts, strict=True) if not part.exists()])
    total = sum(piece.size_bytes for piece in pieces)
    running: dict[Future[None], int] = {}
    # spawned: a forked child of a process with threads may deadlock
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        disable=not progress,
        mininterval=1,
    )
    bar.update(total)
    for piece, part in zip(pieces, parts, strict=True):
        if not part.exists():
            bar.update(-piece.size_bytes)
    with pool, bar:
        try:
            while True:
                while len(running) < 2 * workers and (item := next(todo, None)):
                    piece, part = item
                    job = pool.submit(_tokenize_piece, piece, part, settings, dtype)
                    running[job] = piece.size_bytes
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for job in done:
                    bar.update(running.pop(job))
                    job.result()
        except BrokenProcessPool:
            raise ValueError(
                "a tokenizing worker was killed, probably for want of memory: "
                "run again with fewer --workers; finished pieces are kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _tokenize_piece(piece: Piece, part: Path, settings: Settings, dtype: str) -> None:
    """Tokens, document starts and counts of a piece, per split, as one file."""
    tokenizer = load_tokenizer(settings.tokenizer)
    tokens: dict[str, list[NDArray[Any]]] = {split: [] for split in SPLITS}
    starts: dict[str, list[int]] = {split: [] for split in SPLITS}
    length = dict.fromkeys(SPLITS, 0)
    text_bytes = dict.fromkeys(SPLITS, 0)
    for text in read(piece, settings.field):
        encoded = tokenizer.encode(text.text)
        if not len(encoded):
            continue
        split = piece.split or document_split(text.document, settings.held_out)
        if text.starts:
            starts[split].append(length[split])
        tokens[split].append(encoded.astype(dtype))
        length[split] += len(encoded)
        text_bytes[split] += len(text.text.encode())
    content = {
        split: (np.concatenate([np.empty(0, dtype), *tokens[split]]), np.array(starts[split]))
        for split in SPLITS
    }
    write_part(part, content, text_bytes)


def write_part(
    part: Path,
    content: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    text_bytes: Mapping[str, int] | None = None,
) -> None:
    """One file of (tokens, document starts) per split, whole or not at all.

    `text_bytes` counts the text behind the tokens; without it a token is a byte.
    """
    arrays: dict[str, Any] = {}
    for split, (tokens, starts) in content.items():
        arrays[f"{split}.tokens"] = tokens
        arrays[f"{split}.starts"] = starts.astype(np.uint64)
        arrays[f"{split}.text_bytes"] = np.array(
            len(tokens) if text_bytes is None else text_bytes[split]
        )
    with written_whole(part) as f:
        np.savez(f, **arrays)


def _pack(
    parts: list[Path], split: str, folder: Path, info: DatasetInfo, settings: Settings
) -> SplitInfo:
    """Write one split's MDS shard files from the parts, in order, in place of half-written ones."""
    from streaming import MDSWriter  # imports torch: only the packing process should

    shutil.rmtree(folder, ignore_errors=True)
    counts = SplitInfo()
    with MDSWriter(
        columns=info.columns(),
        out=str(folder),
        hashes=["sha256"],
        size_limit=settings.shard_bytes,
    ) as writer:
        for block, starts in _blocks(parts, split, info, counts):
            writer.write(
                {
                    "tokens": block,
                    "starts": starts,
                    "crc32": block_checksum(block.tobytes(), starts),
                }
            )
            counts.blocks += 1
    counts.index_sha256 = file_sha256(folder / "index.json")
    return counts


def _blocks(
    parts: list[Path], split: str, info: DatasetInfo, counts: SplitInfo
) -> Iterator[tuple[NDArray[Any], bytes]]:
    """The split's blocks and the document starts in each; fills `counts` on the way."""
    size = info.block_size
    rest = np.empty(0, info.dtype)
    rest_starts = np.empty(0, np.int64)
    for part in parts:
        with np.load(part) as arrays:
            tokens = np.concatenate([rest, arrays[f"{split}.tokens"]])
            new_starts = arrays[f"{split}.starts"].astype(np.int64)
            counts.text_bytes += int(arrays[f"{split}.text_bytes"])
        counts.documents += len(new_starts)
        counts.tokens += len(tokens) - len(rest)
        starts = np.concatenate([rest_starts, new_starts + len(rest)])
        whole = len(tokens) // size * size
        for begin in range(0, whole, size):
            first, last = np.searchsorted(starts, [begin, begin + size])
            inside = starts[first:last] - begin
            yield tokens[begin : begin + size], inside.astype("<u4").tobytes()
        rest, rest_starts = tokens[whole:], starts[starts >= whole] - whole
    if len(rest):
        padded = np.zeros(size, info.dtype)
        padded[: len(rest)] = rest
        yield padded, rest_starts.astype("<u4").tobytes()


def _check_not_empty(info: DatasetInfo, settings: Settings, sources: Sequence[str]) -> None:
    if not info.splits["train"].tokens and not info.splits["held_out"].tokens:
        raise ValueError(f"the sources {', '.join(sources)} hold no text")
    if not info.splits["train"].tokens or (
        settings.held_out and not info.splits["held_out"].tokens
    ):
        empty = "held_out" if info.splits["train"].tokens else "train"
        raise ValueError(
            f"the {empty} split is empty: {info.splits[SPLITS[0]].documents} documents are too few "
            f"for --held-out {settings.held_out}; change it, or use 0 to hold nothing out"
        )
