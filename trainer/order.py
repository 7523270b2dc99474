"""The order of sequences: a function of seed and n alone, so a position survives any dp and sp.

Each source of the data goes through epochs of its own; the mixture says whose turn it is.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.mixture import Mixture


@dataclass(frozen=True)
class Position:
    """Where training stands in a source: its sequences consumed since the run began."""

    consumed: int
    sequences: int  # in an epoch

    @property
    def epoch(self) -> int:
        return self.consumed // self.sequences

    @property
    def consumed_in_epoch(self) -> int:
        return self.consumed % self.sequences


@dataclass(frozen=True)
class Span:
    """A source among the tokens of all, which lie end to end."""

    first: int  # token
    sequences: int  # whole ones in it


class SourceOrder:
    """Where the n-th sequence of a source begins: those of an epoch end to end, permuted.

    Permutation and, with `shift`, the first sequence's token follow from `seed` and epoch alone.
    """

    def __init__(
        self, span: Span, seq_len: int, seed: int, shift: bool = False, source: int = 0
    ) -> None:
        self._span, self._seq_len, self._shift = span, seq_len, shift
        self._seed, self._source = seed, source
        self._epoch, self._begins = -1, np.empty(0, np.int64)

    def __getitem__(self, n: int) -> int:
        sequences = self._span.sequences
        epoch, index = divmod(n, sequences)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch, self._source])
            begins = self._span.first + generator.permutation(sequences) * self._seq_len
            if self._shift:
                begins += generator.integers(self._seq_len)
            self._epoch, self._begins = epoch, begins
        return int(self._begins[index])


class SequenceOrder:
    """Where the n-th sequence of the run begins, by the weights of the sources [sources]."""

    def __init__(
        self, spans: list[Span], mixture: Mixture, seq_len: int, seed: int, shift: bool = False
    ) -> None:
        self._spans, self._mixture = spans, mixture
        self._orders = [
            SourceOrder(span, seq_len, seed, shift, source) for source, span in enumerate(spans)
        ]

    def __getitem__(self, n: int) -> int:
        source, index = self._mixture.source(n)
        return self._orders[source][index]

    def positions(self, consumed: int) -> list[Position]:
        """Of every source, after `consumed` sequences of the run."""
        counts = self._mixture.counts(consumed)
        return [
            Position(count, span.sequences) for count, span in zip(counts, self._spans, strict=True)
        ]
