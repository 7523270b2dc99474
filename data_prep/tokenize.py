"""Pieces of text to parts of tokens, by processes side by side; what is there already is kept."""

from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Never

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.parts import PartWriter, Told, document_key, read_table
from data_prep.sources import Faulty, Piece, Text, read, stamp
from data_prep.tokenizer import Tokenizer, load_tokenizer

SHOWN = 60  # characters of a text that a tokenizer changes


class Work(NamedTuple):
    """A piece, where its tokens go, and how they are made."""

    piece: Piece
    part: Path
    tokenizer: str
    fingerprint: str  # of the tokenizer
    field: str
    dtype: str
    end_of_document: int | None


@dataclass
class Limits:
    """How much may be wrong before the preparation stops."""

    faulty: int  # records that are left out
    changes: bool  # whether tokens need not decode to the text
    left_out: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # the first
    changed_texts: int = 0
    lost: int = 0
    marks: int = 0

    def count(self, told: Told) -> None:
        """Raises ValueError where it is too much."""
        self.left_out += told.faulty
        self.changed = self.changed or told.changed
        self.changed_texts += told.changes or len(told.changed)  # of parts of older code
        self.lost += told.lost
        self.marks += told.marks
        if self.lost > self.faulty:
            first = "\n".join(self.left_out[:10])
            if not self.faulty:
                raise ValueError(f"{first}\n(--skip-faulty N leaves out up to N such records)")
            raise ValueError(f"more than --skip-faulty {self.faulty} records are faulty:\n{first}")
        if self.changed and not self.changes:
            raise ValueError(
                f"the tokenizer changes the text, so that its tokens are not the text: "
                f"{self.changed[0]}: take another tokenizer, or say --allow-changes"
            )


def tokenize(work: list[Work], limits: Limits, workers: int, progress: bool) -> None:
    """Make every part that is not there yet, at most 2 * workers pieces in flight.

    Raises ValueError for the first record, or change, beyond the limits.
    """
    todo = []
    for item in work:
        if item.part.exists():
            limits.count(read_table(item.part)[1])
        else:
            todo.append(item)
    total = sum(item.piece.size_bytes for item in work)
    bar = tqdm(
        total=total,
        initial=total - sum(item.piece.size_bytes for item in todo),
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        disable=not progress,
        mininterval=1,
    )
    with bar:
        if min(workers, len(todo)) > 1:
            _side_by_side(todo, limits, workers, bar)
        else:  # no other process need be started
            for item in todo:
                limits.count(_tokenize(item, limits.faulty, limits.changes))
                bar.update(item.piece.size_bytes)


def _side_by_side(todo: list[Work], limits: Limits, workers: int, bar: "tqdm[Never]") -> None:
    waiting = iter(todo)
    running: dict[Future[Told], int] = {}
    # spawned: a forked child of a process with threads may deadlock
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"))
    with pool:
        try:
            while True:
                while len(running) < 2 * workers and (item := next(waiting, None)):
                    job = pool.submit(_tokenize, item, limits.faulty, limits.changes)
                    running[job] = item.piece.size_bytes
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for job in done:
                    bar.update(running.pop(job))
                    limits.count(job.result())
        except BrokenProcessPool:
            raise ValueError(
                "a tokenizing worker was killed, probably for want of memory: "
                "run again with fewer --workers; finished pieces are kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_tokenizer = cache(load_tokenizer)  # once per process: a large one takes longer than a small piece


def _tokenize(work: Work, faulty: int, changes: bool) -> Told:
    """Writes the part of a piece; none where more is wrong than the limits allow."""
    tokenizer = _tokenizer(work.tokenizer)
    if tokenizer.fingerprint != work.fingerprint:
        raise ValueError(f"{work.tokenizer} changed meanwhile: run again when it is whole")
    writer = PartWriter(work.part, work.dtype)
    told = Told([], [])
    begun = False
    for record in read(work.piece, work.field):
        if isinstance(record, Faulty):
            told.faulty.append(record.message)
            told.lost += record.records
            if told.lost > faulty:
                return told
            continue
        told.marks += record.marked
        begun |= record.starts
        tokens = tokenizer.encode(record.text)
        end = work.end_of_document
        change = _ended(record, tokens, end)
        if not change and not tokenizer.exact:
            change = _change(record, tokenizer, tokens)
        if change:
            told.changed, told.changes = told.changed or [change], told.changes + 1
            if not changes:
                return told
        if record.ends and end is not None and (len(tokens) or not record.starts):
            tokens = np.append(tokens, np.uint32(end))
        if len(tokens) or (begun and not record.ends):  # its beginning may be left out
            split = work.piece.files[0].split
            decided = -1 if split is None else int(split == "held_out")
            key = document_key(record.document)
            writer.add(tokens, (len(record.text.encode()), begun, key, decided))
            begun = False
    _check_unchanged(work.piece)  # or a part would hold what its name does not say
    writer.close(told)
    return told


def _check_unchanged(piece: Piece) -> None:
    """Raises ValueError for a file that is not what it was when it was hashed."""
    for file in piece.files:
        try:
            now = stamp(file.path)
        except OSError:
            now = None
        if now != file.stamp:
            raise ValueError(f"{file.path} changed while it was read: run again when it is whole")


def _ended(record: Text, tokens: NDArray[np.uint32], end: int | None) -> str | None:
    """Whose text would end a document in its middle."""
    if end is None or not (tokens == end).any():
        return None
    return f"{record.document}: its text becomes the token that ends documents"


def _change(record: Text, tokenizer: Tokenizer, tokens: NDArray[np.uint32]) -> str | None:
    """Where and how the tokens' text is not the text; None where it is."""
    text, back = record.text, tokenizer.decode(tokens.tolist())
    if back == text and not record.starts:  # a part of a long document: does it follow the last?
        before = tokenizer.encode("a\n").tolist()
        text, back = "a\n" + text[:100], tokenizer.decode(before + tokens[:400].tolist())
        back = back[: len(text)]
    if back == text:
        return None
    pairs = zip(text, back, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
    before = max(0, at - 10)
    shown = f"{text[before : before + SHOWN]!r} becomes {back[before : before + SHOWN]!r}"
    return f"{record.document}, character {at:,}: {shown}"
