"""Which documents are held out: the share that was asked for, by tokens.

Documents are taken in an order that follows from their names, as long as they fit. Where whole
documents leave the share short, the end of one more is held out: of a single one always.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.parts import Table

SHORT = 0.02  # of the share that may be missing before a document is cut
FEW = 1024  # tokens for which no document is cut where there are others
LOOKS = 1000  # smaller documents that are tried to fill a gap


@dataclass(frozen=True)
class Split:
    """Documents that are held out, and one whose last tokens are."""

    held_out: NDArray[np.bool_]  # [documents]
    cut: int = -1  # a document
    cut_tokens: int = 0  # of its end


def document_numbers(table: Table) -> NDArray[np.int64]:
    """[stretches] which document each belongs to."""
    return np.cumsum(table.begins) - 1


def choose(table: Table, share: float) -> Split:
    """A split of all documents; where each is decided already, as it is."""
    numbers = document_numbers(table)
    count = int(numbers[-1]) + 1 if len(numbers) else 0
    decided = table.decided[table.begins]
    if np.all(decided >= 0):
        return Split(decided == 1)
    tokens = np.bincount(numbers, table.lengths, count).astype(np.int64)
    if not tokens.any():
        return Split(np.zeros(count, np.bool_))
    order = np.argsort(table.keys[table.begins], kind="stable")
    held_out = np.zeros(count, np.bool_)
    gap = max(1, round(share * float(tokens.sum()))) if share else 0
    wanted = gap
    fit = int(np.searchsorted(np.cumsum(tokens[order]), gap, side="right"))
    fit = min(fit, count - 1)  # something is left to train on
    held_out[order[:fit]] = True
    gap -= int(tokens[order[:fit]].sum())
    left = order[fit:]
    for document in left[tokens[left] <= gap][:LOOKS]:
        if 0 < tokens[document] <= gap and held_out.sum() < count - 1:
            held_out[document] = True
            gap -= int(tokens[document])
    if gap > SHORT * wanted and gap < FEW and count > 1:
        if not tokens[held_out].any():
            held_out[int(np.argmin(np.where(tokens > 0, tokens, tokens.max() + 1)))] = True
    elif gap > SHORT * wanted and count:
        longest = int(np.argmax(np.where(held_out, -1, tokens)))
        return Split(held_out, longest, min(gap, int(tokens[longest]) - 1))
    return Split(held_out)


def held_tokens(table: Table, split: Split) -> NDArray[np.int64]:
    """[stretches] how many tokens at the end of each are held out."""
    numbers = document_numbers(table)
    held = np.where(split.held_out[numbers], table.lengths, 0)
    left = split.cut_tokens
    for stretch in np.flatnonzero(numbers == split.cut)[::-1]:
        held[stretch] = min(left, int(table.lengths[stretch]))
        left -= int(held[stretch])
    return held
