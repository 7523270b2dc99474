"""Variable tracking: x is set to a value, y to x, z to y; at the end, what is z?

Chains of assignments lie in order among random tokens, beside other chains that are not asked for.
After the `variable tracking` of RULER (Hsieh et al. 2024, arXiv:2404.06654), which asks for all
names that have a value, where this asks for the value of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import Rows, Task

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings

CHAINS = 3  # the first is asked for


class VariableTracking(Task):
    """Chains of `tokens` assignments over `alphabet` names, and as many values and fillers."""

    def words(self, settings: SyntheticSettings) -> int:
        """Fillers, names, values, the sign of an assignment, the marker that asks."""
        return 3 * settings.alphabet + 2

    def answers(self, settings: SyntheticSettings) -> int:
        return settings.alphabet

    def fault(self, settings: SyntheticSettings) -> str | None:
        names, least = CHAINS * settings.tokens, 3 * CHAINS * settings.tokens + 3
        if names > settings.alphabet:
            return (
                f"--tokens {settings.tokens}: {CHAINS} chains of so many assignments need {names} "
                f"names, --alphabet {settings.alphabet} has fewer"
            )
        if settings.length < least:
            return f"--length {settings.length} has no room for the chains: use at least {least}"
        return None

    def sequences(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        alphabet, hops, total = settings.alphabet, settings.tokens, CHAINS * settings.tokens
        sign, ask = 3 * alphabet, 3 * alphabet + 1
        rows = generator.integers(0, alphabet, (count, settings.length))
        names = generator.random((count, alphabet)).argsort(axis=1)[:, :total] + alphabet
        names = names.reshape(count, CHAINS, hops)
        values = generator.integers(0, alphabet, (count, CHAINS))
        sources = np.concatenate([values[:, :, None] + 2 * alphabet, names[:, :, :-1]], axis=2)
        # which chain a place in the text goes on with: every chain in its own order
        turns = generator.permuted(np.resize(np.arange(CHAINS), (count, total)), axis=1)
        slots = (settings.length - 3) // 3
        places = 3 * np.sort(generator.random((count, slots)).argsort(axis=1)[:, :total], axis=1)
        every, done = np.arange(count), np.zeros((count, CHAINS), np.int64)
        for number in range(total):
            chain, place = turns[:, number], places[:, number]
            hop = done[every, chain]
            rows[every, place] = sign
            rows[every, place + 1] = names[every, chain, hop]
            rows[every, place + 2] = sources[every, chain, hop]
            done[every, chain] += 1
        rows[:, -3], rows[:, -2], rows[:, -1] = names[:, 0, -1], ask, ask + 1 + values[:, 0]
        return rows
