"""Text to tokens and back: plain bytes, or any Hugging Face `tokenizers` JSON file."""

import codecs
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.files import at_home
from data_prep.schema import TOKENIZER_NAME


class Tokenizer(Protocol):
    name: str
    vocab_size: int  # one more than the largest id
    fingerprint: str  # changes with whatever changes its output
    exact: bool  # whether tokens of any text decode to that text

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Tokens [n] of a text, without special tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; invalid UTF-8 becomes U+FFFD."""

    def decode_stream(self, context: Sequence[int] = ()) -> "Stream":
        """For tokens one after another, behind those of the context, whose text is out."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name."""

    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] how many bytes of text each token stands for; -1 for an id without one."""


class Stream(Protocol):
    """Text from tokens one after another."""

    def step(self, token: int) -> str:
        """The text that the token completes, often none."""

    def end(self) -> str:
        """What no next token completes any more."""


class ByteTokenizer:
    """The UTF-8 bytes of the text: 256 tokens, nothing to learn, nothing to ship."""

    name = "bytes"
    vocab_size = 256
    fingerprint = "bytes"
    exact = True

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def decode_stream(self, context: Sequence[int] = ()) -> "_ByteStream":
        return _ByteStream()

    def token_id(self, token: str) -> int | None:
        return token.encode()[0] if len(token.encode()) == 1 else None

    def token_bytes(self) -> NDArray[np.int64]:
        return np.ones(256, np.int64)


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class JsonTokenizer:
    """A tokenizer file as the `tokenizers` library saves it, or the folder that holds it.

    What of its state would change the text is switched off: truncation, padding, a model's dropout,
    and special tokens that stand in the text, which are text there.
    """

    exact = False

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = path / TOKENIZER_NAME if path.is_dir() else path
        try:
            data = path.read_bytes()
            self._backend = Backend.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError(
                f"tokenizer {str(path)!r} cannot be read ({error}): give 'bytes', a Hugging Face "
                f"tokenizers JSON file, or a folder that holds its {TOKENIZER_NAME}"
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None
        self.name, self.path = path.name, path
        # ids may have gaps: what counts is the largest, not how many there are
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"tokenizer {str(path)!r} has no tokens")
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def decode_stream(self, context: Sequence[int] = ()) -> "_JsonStream":
        return _JsonStream(self, context)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self) -> NDArray[np.int64]:
        lengths = np.full(self.vocab_size, -1, np.int64)
        for token, index in self._backend.get_vocab().items():
            lengths[index] = self._length(token, index)
        return lengths

    def _length(self, token: str, index: int) -> int:
        if index in self._added:
            return len(token.encode())
        if self._byte_level:  # every character stands for a byte
            return len(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        return len(token.replace("▁", " ").removeprefix("##").encode())

    @cached_property
    def _added(self) -> set[int]:
        return set(self._backend.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str()).get("decoder"))


class _JsonStream:
    """Decodes what is not printed yet, after enough of what is: a decoder may look back.

    The library's own stream refuses ids whose text another id before them had changed.
    """

    def __init__(self, tokenizer: JsonTokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context)
        self._read = len(self._tokens)  # tokens whose text is out
        self._from = 0  # where decoding starts, to have a context

    def step(self, token: int) -> str:
        self._tokens.append(token)
        before, text = self._texts()
        # a character may be in the middle, but of five tokens at most
        if text.endswith("\ufffd") and len(self._tokens) - self._read < 5:
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def end(self) -> str:
        before, text = self._texts()
        self._from = self._read = len(self._tokens)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._tokens[self._from : self._read]), decode(self._tokens[self._from :])


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizers JSON file or its folder. Raises ValueError else."""
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(at_home(name))


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a prepared folder, or a run's folder, carries with it."""
    path = folder / TOKENIZER_NAME
    return JsonTokenizer(path) if path.exists() else ByteTokenizer()
