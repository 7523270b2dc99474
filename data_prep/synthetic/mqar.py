"""Multi-query associative recall: pairs of key and value; later the value of every key is asked.

Queries lie anywhere after the pairs, among blanks. Arora et al. 2023 (arXiv:2312.04927), section 3;
there queries are nearer to the pairs than here, where they are spread evenly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import Rows, Task

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings


class AssociativeRecall(Task):
    """`tokens` pairs of `alphabet` keys and as many values."""

    hidden = False  # a query is its key: the answer after it tells nothing of the next

    def words(self, settings: SyntheticSettings) -> int:
        """The blank, keys, values."""
        return 1 + 2 * settings.alphabet

    def answers(self, settings: SyntheticSettings) -> int:
        return settings.alphabet

    def scored(self, settings: SyntheticSettings) -> int:
        return settings.tokens

    def fault(self, settings: SyntheticSettings) -> str | None:
        if settings.tokens > settings.alphabet:
            return (
                f"--tokens {settings.tokens} pairs need as many keys: use --alphabet "
                f"{settings.tokens} or more"
            )
        if settings.length < 4 * settings.tokens:
            return (
                f"--length {settings.length} has no room for {settings.tokens} pairs and as many "
                f"queries: use at least {4 * settings.tokens}"
            )
        return None

    def sequences(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        pairs, alphabet = settings.tokens, settings.alphabet
        rows, every = np.zeros((count, settings.length), np.int64), np.arange(count)[:, None]
        keys = generator.random((count, alphabet)).argsort(axis=1)[:, :pairs]
        values = generator.integers(0, alphabet, (count, pairs))
        rows[:, 0 : 2 * pairs : 2], rows[:, 1 : 2 * pairs : 2] = 1 + keys, 1 + alphabet + values
        slots = settings.length // 2 - pairs  # after the pairs, of two tokens
        where = 2 * (pairs + generator.random((count, slots)).argsort(axis=1)[:, :pairs])
        rows[every, where], rows[every, where + 1] = 1 + keys, self.words(settings) + values
        return rows
