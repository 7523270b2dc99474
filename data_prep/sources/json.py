"""A .json file: an array of records, or records one after another, on lines or over several."""

import json as json_library
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from data_prep.sources import jsonl
from data_prep.sources.fields import record_of, text_in
from data_prep.sources.pieces import (
    MARK,
    PIECE_BYTES,
    UNTOLD,
    Faulty,
    File,
    Piece,
    Record,
    Text,
    decode,
    whole,
)
from data_prep.sources.storage import open_file

SPACE = " \t\r\n"
AFTER_ANOTHER = re.compile(rb"}[ \t\r]*{")  # records on one line, or text that looks so


def plan(file: File, field: str) -> list[Piece]:
    """Records on lines can be cut; else the file is one piece."""
    if file.size <= PIECE_BYTES:
        return [whole(file)]
    if _on_lines(file):
        return jsonl.plan(replace(file, kind="jsonl"), field)
    return [whole(file)]


def _on_lines(file: File) -> bool:
    """Whether every line is a record, or the beginning of one that was torn there."""
    with open_file(file.path, file.packing) as f:
        if not f.read(4096).removeprefix(MARK).lstrip().startswith(b"{"):
            return False
    with open_file(file.path, file.packing) as f:
        for number, line in enumerate(f):
            text = (line if number else line.removeprefix(MARK)).strip()
            if not text:
                continue
            # what goes on in the next line is no record of its own, and torn there but by chance
            if not text.startswith(b"{") or text.endswith((b"{", b"[", b",", b":")):
                return False
            if AFTER_ANOTHER.search(text) and _several(text):
                return False
    return True


def _several(line: bytes) -> bool:
    """Whether a line holds more than one record."""
    try:
        text = line.decode()
        return _skip(text, json_library.JSONDecoder().raw_decode(text)[1], SPACE) < len(text)
    except (ValueError, RecursionError):
        return False


def read(piece: Piece, field: str) -> Iterator[Record]:
    for file in piece.files:
        with open_file(file.path, file.packing) as f:
            data = f.read()
        marked = data.startswith(MARK)
        try:
            text = decode(data[len(MARK) * marked :], file, len(MARK) * marked)
            values = _values(text, file.path)
            first = next(values, None)
        except ValueError as error:
            if _one_record(data):  # the file is lost, and nothing else with it
                yield Faulty(str(error).replace(UNTOLD, ""))
                continue
            raise
        line, counted = 1, 0
        for at, value in chain([first] if first else [], values):
            line, counted = line + text.count("\n", counted, at), at
            try:
                found = text_in(value, field)
            except ValueError as error:
                yield Faulty(f"{file.path}:{line}: {error}")
            else:
                yield Text(f"{file.name}:{at}", found, marked=marked)
            marked = False


def _values(text: str, path: str) -> Iterator[tuple[int, Any]]:
    """(offset, value) of every record. Raises ValueError for what is no JSON."""
    decoder = json_library.JSONDecoder(object_pairs_hook=record_of)
    at = _skip(text, 0, SPACE)
    array = text[at : at + 1] == "["
    closed = not array
    if array:
        at = _skip(text, at + 1, SPACE)
    while at < len(text):
        if array and text[at] == "]":
            at, closed = _skip(text, at + 1, SPACE), True
            break
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error).split(";")[0]
            bad = getattr(error, "pos", at)
            raise _no_json(text, bad, path, reason) from None
        yield at, value
        at = _skip(text, end, SPACE)
        if array and text[at : at + 1] == ",":
            at = _skip(text, at + 1, SPACE)
            if text[at : at + 1] != "]":
                continue
        elif not array or text[at : at + 1] in ("]", ""):
            continue
        raise _no_json(text, at, path, "one comma between records, and none after")
    if at < len(text) or not closed:
        why = "the array has no end" if not closed else "something after the array"
        raise _no_json(text, at, path, why)


def _one_record(data: bytes) -> bool:
    """Whether a file is to hold one: no array, and no second one that begins on a line."""
    data = data.removeprefix(MARK).strip(SPACE.encode())
    return data.startswith(b"{") and b"\n{" not in data


def _no_json(text: str, at: int, path: str, reason: str) -> ValueError:
    line = text.count("\n", 0, at) + 1
    return ValueError(f"{path}:{line}: not JSON ({reason}){UNTOLD}")


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at
