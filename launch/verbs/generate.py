"""python -m launch generate RUN_DIR --prompt TEXT"""

import argparse
import io
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from data_prep.files import at_home

HELP = "continue a text with a trained model"
CONTEXT_TOKENS = 8  # of a prompt, at which a decoder may look back
PIECE_BYTES = 1 << 20  # of a prompt, that are made tokens at a time
LONG_PROMPT_SECONDS = 2.0  # of reading, after which it is told how far it is


class Stream(Protocol):
    """A tokenizer's (data_prep.tokenizer)."""

    def step(self, token: int) -> str: ...
    def end(self) -> str: ...


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument(
        "--prompt-file", metavar="FILE", help="UTF-8 text of any length, as it is; - reads stdin"
    )
    add("--max-tokens", type=int, default=256)
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    add("--top-k", type=int, default=0, help="sample among the k likeliest; 0: among all")
    add("--top-p", type=float, default=1.0, help="and among the fewest with this probability")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} is not positive")
    if "" in args.stop:
        raise ValueError("--stop is empty: give the text to end before")
    prompt = args.prompt or ""
    if not prompt.isprintable() and any("\udc80" <= sign <= "\udcff" for sign in prompt):
        raise ValueError("--prompt is not UTF-8: convert it, or give it as --prompt-file")
    pieces = iter([prompt]) if args.prompt is not None else _pieces(args.prompt_file)
    first = next(pieces, "")  # before the model is loaded: it may not be there, or be no text
    import torch

    from trainer.generate import Sampling, generate, load_run

    chosen = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    trained = load_run(args.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sampling = replace(chosen, known=trained.known)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a terminal lacks a character
    print(f"[{args.run}, step {trained.step}]", file=sys.stderr)
    encoded = (trained.tokenizer.encode(piece).tolist() for piece in chain([first], pieces))
    with _Reading() as reading:
        read: deque[int] = deque(maxlen=CONTEXT_TOKENS)
        tokens = _kept(chain.from_iterable(encoded), read)
        drawn = generate(trained.model, tokens, args.max_tokens, sampling, on_read=reading.show)
        try:
            first_drawn = list(islice(drawn, 1))  # for which all of the prompt is read
            stream = trained.tokenizer.decode_stream(list(read))
            written = _until_end(chain(first_drawn, drawn), trained.end_of_document)
            for text in until_stop(stream, written, args.stop):
                reading.clear()
                print(text, end="", flush=True)
        except BrokenPipeError:  # whoever read has had enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (or Python complains at its end)
            return 0
        except KeyboardInterrupt:
            print(flush=True)
            return 130
    print()
    return 0


def _pieces(file: str) -> Iterator[str]:
    """The prompt's bytes as text, unchanged, however many: cut behind a line, where it is long."""
    if file == "-" and sys.stdin is None:
        raise ValueError("--prompt-file -: there is no stdin")
    name, lines = "stdin" if file == "-" else file, 0
    with nullcontext(sys.stdin.buffer) if file == "-" else at_home(file).open("rb") as source:
        data = source.read(PIECE_BYTES)
        while data:
            more = source.read(PIECE_BYTES)
            end = data.rfind(b"\n") + 1 or _characters(data) if more else len(data)
            try:
                yield data[:end].decode()
            except UnicodeDecodeError as error:
                line = lines + data.count(b"\n", 0, error.start) + 1
                raise ValueError(
                    f"{name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 "
                    f"({error.reason}): convert the prompt"
                ) from None
            lines += data.count(b"\n", 0, end)
            data = data[end:] + more


def _characters(data: bytes) -> int:
    """How many of these bytes are whole characters."""
    for end in range(len(data) - 1, max(0, len(data) - 5), -1):
        if data[end] & 0xC0 != 0x80:  # the first byte of the last one
            return end
    return len(data)


class _Reading:
    """How far a long prompt is read, on stderr."""

    def __init__(self) -> None:
        self._began, self._shown = time.monotonic(), False

    def __enter__(self) -> "_Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, read: int) -> None:
        if time.monotonic() - self._began > LONG_PROMPT_SECONDS:
            self._shown = True
            print(f"\rreading the prompt: {read:,} tokens", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print(f"\r{' ' * 60}\r", end="", file=sys.stderr, flush=True)
            self._shown = False


def _kept(tokens: Iterable[int], last: deque[int]) -> Iterator[int]:
    """The same, and the last of them in `last`."""
    for token in tokens:
        last.append(token)
        yield token


def _until_end(tokens: Iterable[int], end: int | None) -> Iterator[int]:
    for token in tokens:
        if token == end:
            return
        yield token


def until_stop(stream: Stream, tokens: Iterable[int], stops: list[str]) -> Iterator[str]:
    """The text of tokens as it comes, up to the first of `stops`, which is not part of it.

    What may be the beginning of one is held back until it is known.
    """
    held = ""
    longest = max(map(len, stops), default=0)
    for token in tokens:
        held += stream.step(token)
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        keep = next(
            (n for n in range(min(longest, len(held)), 0, -1) if _begins(stops, held[-n:])), 0
        )
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    held += stream.end()
    found = [at for stop in stops if (at := held.find(stop)) >= 0]
    yield held[: min(found)] if found else held


def _begins(stops: list[str], text: str) -> bool:
    return any(stop.startswith(text) for stop in stops)
