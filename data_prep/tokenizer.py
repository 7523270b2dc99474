"""Text to tokens and back: plain bytes, or any Hugging Face `tokenizers` JSON file."""

import codecs
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.schema import TOKENIZER_NAME


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    fingerprint: str  # changes with whatever changes its output

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Tokens [n] of a text, without special tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; invalid UTF-8 becomes U+FFFD."""

    def decode_stream(self) -> Callable[[int], str]:
        """A function of one token after another: the text that each completes, often none."""


class ByteTokenizer:
    """The UTF-8 bytes of the text: 256 tokens, nothing to learn, nothing to ship."""

    name = "bytes"
    vocab_size = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def decode_stream(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))


class JsonTokenizer:
    """A tokenizer file as the `tokenizers` library saves it."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            data = path.read_bytes()
            self._backend = Backend.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError(
                f"tokenizer {str(path)!r} cannot be read ({error}): "
                f"give 'bytes' or a Hugging Face tokenizers JSON file"
            ) from None
        self.name = path.name
        # ids may have gaps: what counts is the largest, not how many there are
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def decode_stream(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(self._backend, token) or ""


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizers JSON file. Raises ValueError for anything else."""
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(Path(name))


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a prepared folder, or a run's folder, carries with it."""
    path = folder / TOKENIZER_NAME
    return JsonTokenizer(path) if path.exists() else ByteTokenizer()
